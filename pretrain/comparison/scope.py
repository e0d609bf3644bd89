"""How the runs of a comparison ended, and which of them a report uses. This module imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.results import RunResult

DIVERGED_FRAC = 0.2
"""Share by which a loss has risen in a run that diverged. Seeds of one arm differ by 1 or 2 %."""
_WINDOW = 5
"""Number of logged rows over which the median of the training loss is taken."""


@dataclass(frozen=True)
class RunEnd:
    """How a run ended. A run that failed or diverged is lost, which counts against its arm."""

    kind: Literal["finished", "diverged", "failed", "unfinished"]
    why: str = ""

    @property
    def lost(self) -> bool:
        return self.kind in ("diverged", "failed")


def run_ends(results: Sequence[RunResult]) -> dict[str, RunEnd]:
    """By name, how every run ended."""
    lowest: dict[str, float] = {}
    for run in results:
        if run.finished and math.isfinite(loss := _final_loss(run)):
            lowest[run.arm] = min(loss, lowest.get(run.arm, loss))
    return {run.planned.name: _run_end(run, lowest.get(run.arm, math.inf)) for run in results}


def _run_end(run: RunResult, lowest: float) -> RunEnd:
    """How a run ended, given the lowest final loss of the runs of its arm."""
    if not run.finished:
        if run.record.get("status") == "failed":
            return RunEnd("failed", str(run.record["attempts"][-1].get("reason", "")).partition("\n")[0])
        return RunEnd("unfinished")
    loss = _final_loss(run)
    if not math.isfinite(loss):
        return RunEnd("diverged", f"its held-out loss is {loss}")
    if loss > (1 + DIVERGED_FRAC) * lowest:
        return RunEnd("diverged", f"its held-out loss is {loss:.3f}, that of another seed {lowest:.3f}")
    if (rise := _risen_frac(run)) > DIVERGED_FRAC:
        return RunEnd("diverged", f"its training loss is {100 * rise:.0f} % above its lowest")
    return RunEnd("finished")


def _final_loss(run: RunResult) -> float:
    """The last held-out loss over all targets."""
    return float(run.curve(run.total).values[-1])


def _risen_frac(run: RunResult) -> float:
    """How far the training loss has risen since its lowest, as a share, by medians of neighbouring rows."""
    values = run.curve("train/loss").values
    if len(values) < 2 * _WINDOW:
        return 0.0
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, _WINDOW), axis=1)
    return float(medians[-1] / medians.min()) - 1


@dataclass(frozen=True)
class Scope:
    """The runs that a report uses, and the step up to which it uses them."""

    seeds: tuple[int, ...]
    """The seeds in which every arm has a run that is used."""
    until_step: int
    """Last step of the baseline; `until` gives that of any run."""
    interim: bool
    """Whether no seed has finished in all arms; curves then end at the last step that all have evaluated."""
    ends: dict[str, RunEnd]
    """By name, how every planned run ended."""
    used: frozenset[str]
    """Names of the runs that are used."""
    share: Fraction
    """Share of the steps of a run that the report covers."""
    diverged: tuple[str, ...] = ()
    """Arms of which every finished run diverged. They are shown, and take no part in the statistics."""
    failed: tuple[str, ...] = ()
    """Arms of which every run failed. They have no final loss, and only words tell of them."""

    def until(self, run: RunResult) -> int:
        """Last step of a run that the report covers."""
        return int(self.share * run.planned.num_steps)

    @property
    def num_finished(self) -> int:
        """Number of runs that finished and did not diverge."""
        return sum(end.kind == "finished" for end in self.ends.values())

    @property
    def unfinished(self) -> tuple[str, ...]:
        """Names of the runs that have neither finished nor failed."""
        return tuple(name for name, end in self.ends.items() if end.kind == "unfinished")

    @property
    def lost(self) -> dict[str, RunEnd]:
        """By name, the runs that failed or diverged."""
        return {name: end for name, end in self.ends.items() if end.lost}


def _failed_arms(plan: Plan, ends: Mapping[str, RunEnd]) -> tuple[str, ...]:
    """The arms of which every run failed; none if fewer than two others would remain."""
    kinds = {arm: {ends[run.name].kind for run in plan.runs if run.arm == arm} for arm in plan.others}
    failed = tuple(arm for arm, ended in kinds.items() if ended == {"failed"})
    return failed if len(failed) <= len(plan.arms) - 2 else ()


def scope_of(plan: Plan, results: Sequence[RunResult]) -> Scope:
    """All runs that finished and did not diverge, if they include a whole seed of all arms.

    Otherwise the seeds that all arms have evaluated, cut at a common share of the steps. An arm whose
    finished runs have all diverged is shown with these. An arm whose runs have all failed is left out, if two
    others remain. Raises ConfigError if there is nothing to report on.
    """
    ends = run_ends(results)
    failed = _failed_arms(plan, ends)
    plan, results = plan.without(failed), [r for r in results if r.arm not in failed]
    usable = {r.planned.name for r in results if ends[r.planned.name].kind == "finished"}
    diverged = []
    for arm in plan.arms:
        own = {r.planned.name for r in results if r.arm == arm and r.finished}
        if own and not own & usable:
            diverged.append(arm)
            usable |= own
    num_steps = next(run.num_steps for run in plan.runs if run.arm == plan.config.baseline)

    def whole(names: set[str]) -> tuple[int, ...]:
        return tuple(s for s in plan.seeds if all(r.planned.name in names for r in results if r.seed == s))

    if seeds := whole(usable):
        return Scope(seeds, num_steps, False, ends, frozenset(usable), Fraction(1), tuple(diverged), failed)
    evaluated = whole({r.planned.name for r in results if r.last_eval_step > 0})
    if not evaluated:
        missing = [name for name, end in ends.items() if end.kind != "finished"]
        raise ConfigError(
            f"{plan.directory}: nothing to report on: no seed has been evaluated in all arms "
            f"({', '.join(plan.arms)}); missing or unfinished: {', '.join(missing)}"
        )
    used = [r for r in results if r.seed in evaluated]
    share = min(Fraction(r.last_eval_step, r.planned.num_steps) for r in used)
    names = frozenset(r.planned.name for r in used)
    return Scope(evaluated, int(share * num_steps), True, ends, names, share, failed=failed)
