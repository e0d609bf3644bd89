"""The check of all nodes before ranks start: it writes the spec of the check and reads the answers.

Every node checks itself (parallel/node_check.py) and answers in a folder of the attempt's logs:
    spec.json  token  answers/<node>.json
This module imports no torch.
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
    STAGES.index("started"): "hung while it checked itself: a file system or a GPU does not answer",
    STAGES.index("local"): "could not reach the first node over the network",
    _MET: "hung or was cut off in a sum over the nodes",
}


def write_spec(config: PreflightConfig, *, gpus: int, run_dir: Path, folder: Path) -> Path:
    """Write the spec of the check into `folder`; returns its file. Raises OSError."""
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
    """The problem of every bad node, in one line; {} if all is well.

    The only key is "" if the problem is no single node's fault, since other nodes would not help. Named are
    the nodes that found a problem; if there are none, the nodes that came less far than others, which wait
    for them.
    """
    answers = {node: _answer(folder, node) for node in nodes}
    for answer in answers.values():
        if answer["shared"]:
            return {"": answer["shared"][0]}
    problems = {node: "; ".join(answer["problems"]) for node, answer in answers.items() if answer["problems"]}
    if problems:
        same = len(set(problems.values())) == 1 and len(problems) == len(nodes) > 1
        return {"": f"every node: {problems[nodes[0]]}"} if same else problems
    stages = {node: answer["stage"] for node, answer in answers.items()}
    best = max(stages.values())
    if min(stages.values()) == _DONE:
        return {}
    behind = [node for node in nodes if stages[node] < best]
    if len(nodes) == 1 and best > _NO_ANSWER:
        behind = list(nodes)
    elif best == _MET and len(behind) == len(nodes) - 1 > 1 and _NO_ANSWER not in stages.values():
        # Nodes meet at the first node, and no other node reached it.
        return {node: "no other node reached it over the network" for node in nodes if node not in behind}
    if behind:
        return {node: _HUNG[stages[node]] for node in behind}
    errors = sorted({f"{node}: {answer['error']}" for node, answer in answers.items() if answer["error"]})
    return {"": "; ".join([f"every node: {_HUNG[best]}", *errors])}


def _answer(folder: Path, node: str) -> dict[str, Any]:
    """The answer of a node, with its stage as an index of STAGES; _NO_ANSWER if it left none."""
    try:
        answer = json.loads((folder / ANSWERS / f"{node}.json").read_text())
    except (OSError, ValueError):
        return {"stage": _NO_ANSWER, "problems": [], "shared": [], "error": None}
    return answer | {"stage": STAGES.index(answer["stage"])}
