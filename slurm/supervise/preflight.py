"""The look at every node before ranks start: what to ask, and what the answers say. Imports no torch.

Nodes answer for themselves (parallel/node_check.py), into a folder of the attempt's logs:
    spec.json  token  answers/<node>.json
"""

import dataclasses
import json
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parallel.node_check import STAGES, TOKEN, Spec
from slurm.profile import PreflightConfig

SPEC, ANSWERS = "spec.json", "answers"
_MET, _DONE = STAGES.index("met"), STAGES.index("done")
_NO_ANSWER = -1
_HUNG = {
    _NO_ANSWER: "no answer: its task did not start, or does not share the run directory's file system",
    STAGES.index("started"): "hung while it looked at itself: a file system or a GPU does not answer",
    STAGES.index("local"): "could not reach the first node over the network",
    _MET: "hung or was cut off in a sum over the nodes",
}


def write_spec(config: PreflightConfig, *, gpus: int, run_dir: Path, folder: Path) -> Path:
    """Make `folder` with what nodes are to look at; the file for parallel.node_check. Raises OSError."""
    (folder / ANSWERS).mkdir(parents=True)
    token = secrets.token_hex()
    (folder / TOKEN).write_text(token)
    spec = Spec(
        token=token,
        answers=str(folder.absolute() / ANSWERS),
        gpus=gpus,
        min_free_gpu_gib=config.min_free_gpu_gib,
        min_free_disk_gib={**config.min_free_disk_gib, str(run_dir.absolute()): config.min_free_run_dir_gib},
        max_clock_skew_s=config.max_clock_skew_s,
        all_reduce=config.all_reduce,
        timeout_s=config.timeout_s,
    )
    (folder / SPEC).write_text(json.dumps(dataclasses.asdict(spec), indent=1))
    return folder / SPEC


def problems(folder: Path, nodes: Sequence[str]) -> dict[str, str]:
    """What is wrong, by node, in one line each; {} if all is well. Under "": what is no single node's fault,
    alone, for then other nodes would not help.

    Nodes that found something are named; if none did, those that came less far than others: the others wait
    for them, in vain.
    """
    answers = {node: _answer(folder, node) for node in nodes}
    for answer in answers.values():
        if answer["shared"]:
            return {"": answer["shared"][0]}
    found = {node: "; ".join(answer["problems"]) for node, answer in answers.items() if answer["problems"]}
    if found:
        same = len(set(found.values())) == 1 and len(found) == len(nodes) > 1
        return {"": f"every node: {found[nodes[0]]}"} if same else found
    stages = {node: answer["stage"] for node, answer in answers.items()}
    best = max(stages.values())
    if min(stages.values()) == _DONE:
        return {}
    behind = [node for node in nodes if stages[node] < best]
    if len(nodes) == 1 and best > _NO_ANSWER:
        behind = list(nodes)
    elif best == _MET and len(behind) == len(nodes) - 1 > 1 and _NO_ANSWER not in stages.values():
        # The first node holds the place where nodes meet: it is the one that nobody reaches.
        return {node: "no other node reached it over the network" for node in nodes if node not in behind}
    if behind:
        return {node: _HUNG[stages[node]] for node in behind}
    errors = sorted({f"{node}: {answer['error']}" for node, answer in answers.items() if answer["error"]})
    return {"": "; ".join([f"every node: {_HUNG[best]}", *errors])}


def _answer(folder: Path, node: str) -> dict[str, Any]:
    try:
        answer = json.loads((folder / ANSWERS / f"{node}.json").read_text())
    except (OSError, ValueError):
        return {"stage": _NO_ANSWER, "problems": [], "shared": [], "error": None}
    return answer | {"stage": STAGES.index(answer["stage"])}
