"""Steps have costs: those of a run's trunk, its own, those that were set aside, and those that spikes lost.
Imports no torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pretrain.metrics import rows_up_to
from pretrain.newest_rows import last_row
from pretrain.run_dir import read_record
from pretrain.run_files import METRICS
from pretrain.train.spikes import lost_row


class Costs(NamedTuple):
    """The tokens, FLOPs and seconds of steps."""

    steps: int
    tokens: int
    """Slots of the global batches, padding included."""
    flops: float
    seconds: float

    def minus(self, other: "Costs") -> "Costs":
        """Return what is left without the costs of `other`."""
        return Costs(
            self.steps - other.steps,
            self.tokens - other.tokens,
            self.flops - other.flops,
            self.seconds - other.seconds,
        )


NOTHING = Costs(0, 0, 0.0, 0.0)


def inherited_and_own(run_dir: Path) -> tuple[Costs, Costs]:
    """(what the trunk of a run spent before the run began, what the run has spent itself), up to its last row
    of metrics. Own costs of a trunk and its branches may be summed: none of them counts a step twice."""
    branch, row = read_record(run_dir).get("branch"), last_row(run_dir / METRICS)
    inherited = NOTHING if branch is None else Costs(**branch["inherited"])
    return inherited, _since_start(row).minus(inherited) if row else NOTHING


def behind(run_dir: Path, step: int) -> Costs:
    """Return what the run spent behind `step`, by its rows of metrics."""
    last, kept = last_row(run_dir / METRICS), rows_up_to(run_dir / METRICS, step)[0].splitlines()
    if not last or last["step"] <= step:
        return NOTHING
    before = _since_start(json.loads(kept[-1])) if kept else inherited_and_own(run_dir)[0]
    return _since_start(last).minus(before)


def spikes_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of record.json on the spikes that a checkpoint's `state` knows; empty if there were none."""
    if not state.get("spikes"):
        return {}
    return {"spikes": {"events": state["spikes"], **lost_row(state["total"])}}


def _since_start(row: Mapping[str, Any]) -> Costs:
    """The costs of all steps up to a row of metrics, those of trunks included."""
    return Costs(row["step"], row["tokens"], row["compute/train_flops"], row["time/train_s"])
