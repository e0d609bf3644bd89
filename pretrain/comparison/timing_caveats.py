"""What a reader must know about seconds. This module imports no torch."""

from collections.abc import Iterator, Sequence
from typing import Any

from pretrain.comparison.caveat import Caveat
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult
from pretrain.comparison.step_timing import time_ratio, timing_runs
from pretrain.quantities import percent, ratio
from pretrain.run_dir import read_record

WIDE = 0.05
"""Half the width of the interval of a ratio of seconds, as a share, above which a warning stands."""
PLACE = ("device", "processor", "layout")
"""Fields of an attempt that say where it ran."""


def of_timing(plan: ComparisonPlan, results: Sequence[RunResult]) -> Iterator[Caveat]:
    """Caveats about the seconds of a comparison, or of a cell of a ladder."""
    if not plan.timing:
        return
    size = plan.runs[0].size_arm[0]
    for arm in plan.others:
        found = time_ratio(plan, arm, size)
        if found is None or found.interval is None:
            continue
        low, high = found.interval.low, found.interval.high
        half = max(found.value / low, high / found.value) - 1
        spread = f"{percent(plan.config.confidence)} interval {ratio(low)} to {ratio(high)}"
        yield Caveat(
            f"Seconds are those of {len(found.per_seed)} timing rounds: a step of {arm} took "
            f"{ratio(found.value)} times as long as one of {plan.config.baseline} ({spread}). "
            + (
                "The rounds differ so much that something else must have run on the machine."
                if half > WIDE
                else "Intervals of ratios of seconds hold this, intervals of losses do not."
            ),
            grave=half > WIDE,
        )
    timed = [read_record(run.config.run_dir) for run in timing_runs(plan)]
    there, here = _places(timed), _places([run.record for run in results])
    if there != here:
        yield Caveat(
            "The timing rounds ran on another machine, device or layout than the runs that are compared: "
            "their seconds are those of the former.",
            grave=True,
        )


def _places(records: Sequence[dict[str, Any]]) -> set[str]:
    """Where the attempts of runs were made."""
    attempts = [attempt for record in records for attempt in record.get("attempts", [])]
    return {str([attempt.get(key) for key in PLACE]) for attempt in attempts if attempt.get("device")}
