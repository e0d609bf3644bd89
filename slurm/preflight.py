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

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    field_validator,
)

from parallel.node_check import STAGES, TOKEN, Spec

SPEC, ANSWERS = "spec.json", "answers"
_MET, _DONE = STAGES.index("met"), STAGES.index("done")
_NO_ANSWER = -1
_HUNG = {
    _NO_ANSWER: "no answer: its task did not start, or does not share the run directory's file system",
    STAGES.index("started"): "hung while it looked at itself: a file system or a GPU does not answer",
    STAGES.index("local"): "could not reach the first node over the network",
    _MET: "hung or was cut off in a sum over the nodes",
}


class PreflightConfig(BaseModel):
    """The table [preflight] of a profile: what a node must have before ranks start on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    min_free_gpu_gib: NonNegativeFloat = 0.0
    """Of each GPU; 0: not looked at. That there are gpus_per_node is looked at in any case."""
    min_free_run_dir_gib: NonNegativeFloat = 1.0
    """Where the run directory is."""
    min_free_disk_gib: dict[str, NonNegativeFloat] = {}
    """By absolute path, as nodes see it: {"/scratch" = 20}."""
    max_clock_skew_s: PositiveFloat = 5.0
    """From the median of all nodes."""
    all_reduce: bool = True
    """A short sum over the nodes. False: nodes do not meet, and clocks are not compared either."""
    timeout_s: int = Field(default=180, ge=10, le=3600)
    """For all of it, with the import of torch."""
    max_excluded: NonNegativeInt = 2
    """Nodes that a submission may exclude before it stops."""

    @field_validator("min_free_disk_gib")
    @classmethod
    def _are_absolute(cls, paths: dict[str, float]) -> dict[str, float]:
        for path in paths:
            if not Path(path).is_absolute():
                raise ValueError(f'"{path}" is no absolute path (variables are not filled in)')
        return paths


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
