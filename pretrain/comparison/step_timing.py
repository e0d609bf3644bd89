"""Timing rounds: short runs of every arm, one at a time and in turns, which tell the seconds of a step.

Seconds of the runs themselves are those of a machine that several runs may share, hours apart. A round times
every arm once, in an order that turns from round to round, so that a slow spell of the machine meets all arms
alike. The runs lie in the folder `timing` of the comparison. This module imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.matched_flops import match_budgets
from pretrain.comparison.plan import ComparisonPlan, PlannedRun, SizeArm
from pretrain.comparison.results import load_run
from pretrain.comparison.run_length import with_steps
from pretrain.comparison.statistics import Interval, RatioEstimate, ratio_over_seeds
from pretrain.config import RunConfig, differences
from pretrain.quantities import ratio, with_prefix
from pretrain.run_dir import finished_step, is_free
from pretrain.run_files import CONFIG, METRICS

TIMING = "timing"
"""Folder of the timing runs in the directory of a comparison."""
STEPS, STARTING_STEPS = 30, 10
"""Steps of a timing run, and how many of the first are left out: they hold allocation and compilation."""


_SAME_STEPS = ("seed", "optimizer.learning_rate", "optimizer.schedule.warmup_steps")
"""Keys that are those of the first run of an arm, which another budget or seed may become, and by which no
step takes longer."""


@dataclass(frozen=True)
class StepTiming:
    """What a step of one arm took, waiting for data included."""

    seconds: tuple[float, ...]
    """By round, the mean over the steps of its timing run."""

    @property
    def median(self) -> float:
        """The median over the rounds, in seconds."""
        return float(np.median(self.seconds))

    @property
    def spread(self) -> float:
        """The slowest round over the fastest, less 1."""
        return max(self.seconds) / min(self.seconds) - 1


def timing_runs(plan: ComparisonPlan) -> tuple[PlannedRun, ...]:
    """The timing runs in the order in which they are made: by round, in turns over sizes and arms."""
    first: dict[SizeArm, PlannedRun] = {}
    for run in plan.runs:
        first.setdefault(run.size_arm, run)
    once = list(first.values())
    rounds = [once[turn % len(once) :] + once[: turn % len(once)] for turn in range(plan.config.rounds)]
    return tuple(
        replace(run, round=number, config=_timed(run, number))
        for number, order in enumerate(rounds, start=1)
        for run in order
    )


def _timed(run: PlannedRun, number: int) -> RunConfig:
    """The config of a timing run, which evaluates and saves after its last step alone."""
    config = run.config
    short = with_steps(config, STEPS, config.num_steps, source=f"timing of {run.name}")
    size, arm = run.size_arm
    every = {"log": STARTING_STEPS, "eval": STEPS, "eval_conditional": None, "checkpoint": STEPS}
    alone = {"generate": 0, "last_documents": None, "conditional_documents": 0}
    changes: dict[str, Any] = {
        "name": f"{f'{size}_' if size else ''}{arm}_round{number}",
        "runs_dir": str(Path(config.runs_dir) / TIMING),
        "evaluate": config.evaluate.model_copy(update=alone),
        "every_steps": config.every_steps.model_copy(update=every | {"samples": None}),
    }
    return short.model_copy(update=changes)


def rounds_to_make(runs: Sequence[PlannedRun]) -> list[PlannedRun]:
    """The timing runs of all rounds that are not whole. A round that was cut off is measured again as one."""
    cut = {run.round for run in runs if finished_step(run.config) != run.num_steps}
    return [run for run in runs if run.round in cut]


def _check_same_steps(run: PlannedRun) -> None:
    """Raise ConfigError if the directory of a timing run was made by a config whose steps are others."""
    path = run.config.run_dir / CONFIG
    if not path.exists():
        return
    there = validate(RunConfig, read_object(path), source=str(path))
    changed = [
        f"  {key}: {old!r} there, {new!r} now"
        for key, old, new in differences(there, run.config)
        if key not in _SAME_STEPS and not is_free(key)
    ]
    if changed:
        raise ConfigError(
            f"{run.config.run_dir} was timed with another config:\n" + "\n".join(changed) + "\n"
            f"Remove {run.config.run_dir.parent}, and the same command times all arms; or give the "
            "comparison another name"
        )


def with_timing(plan: ComparisonPlan) -> ComparisonPlan:
    """The plan with what its timing rounds found, or with the timing runs as those that come first.

    Raises ConfigError for files that a run cannot have written, and for rounds of another config.
    """
    runs = timing_runs(plan)
    for run in runs:
        _check_same_steps(run)
    if rounds_to_make(runs):
        return replace(plan, first=runs)
    seconds: dict[SizeArm, list[float]] = {}
    for run in runs:
        curve = load_run(run, causally=False).curve("time/train_s")
        if len(curve) < 2:
            raise ConfigError(
                f"{run.config.run_dir / METRICS}: fewer than two rows hold time/train_s, so this timing run "
                f"tells no seconds; remove {run.config.run_dir}, and the same command makes its round again"
            )
        steps, spent = curve.steps[[0, -1]], curve.values[[0, -1]]
        seconds.setdefault(run.size_arm, []).append(float(np.diff(spent)[0] / np.diff(steps)[0]))
    timing = {at: StepTiming(tuple(of)) for at, of in seconds.items()}
    timed = replace(plan, timing=timing)
    return replace(timed, runs=tuple(replace(run, step_s=_step_s(timed, run)) for run in plan.runs))


def _step_s(plan: ComparisonPlan, run: PlannedRun) -> float:
    """Seconds of a step of a run: the baseline's median times the ratio within rounds, which a slow spell of
    the machine moves less than medians of both arms."""
    size, arm = run.size_arm
    found = time_ratio(plan, arm, size)
    assert found is not None, run.size_arm
    return plan.timing[size, plan.config.baseline].median * found.value


def match_seconds(plan: ComparisonPlan) -> list[RunConfig]:
    """The configs of all runs of a timed plan of one size and budget, with the steps for which they take as
    long as the baseline. Raises ConfigError if no whole number of steps comes within 0.5 %."""
    cost = {run.arm: Fraction(run.step_s or 0.0) for run in plan.runs}
    runs = [(run.arm, run.config) for run in plan.runs]
    return match_budgets(
        runs, plan.config.baseline, lambda arm, _: cost[arm], match="seconds", source=str(plan.path)
    )


def time_ratio(plan: ComparisonPlan, arm: str, size: str = "") -> RatioEstimate | None:
    """How many times longer a step of an arm takes than one of the baseline, over the rounds, each of which
    timed both; None without timing rounds."""
    pair = [plan.timing.get((size, name)) for name in (plan.config.baseline, arm)]
    base, other = pair
    if base is None or other is None:
        return None
    ratios = [b / a for a, b in zip(base.seconds, other.seconds, strict=True)]
    return ratio_over_seeds(ratios, plan.config.confidence)


def over_rounds(
    estimate: RatioEstimate | None, rounds: RatioEstimate | None, confidence: float
) -> RatioEstimate | None:
    """A ratio of seconds whose interval holds what other seeds and other timing rounds would change.

    `estimate`: over the seeds, at the seconds of a step of `_step_s`. `rounds`: the ratio of these.
    Variances of logarithms add up; degrees of freedom are Satterthwaite's.
    """
    if estimate is None or estimate.interval is None or rounds is None:
        return estimate
    parts = [
        (np.var(np.log(r.per_seed), ddof=1) / len(r.per_seed), len(r.per_seed) - 1)
        for r in (estimate, rounds)
    ]
    variance = float(sum(v for v, _ in parts))
    if variance == 0:
        return estimate
    dof = variance**2 / float(sum(v**2 / n for v, n in parts))
    half = float(stats.t.ppf(0.5 + confidence / 2, dof)) * math.sqrt(variance)
    center = math.log(estimate.value)
    return replace(estimate, interval=Interval(math.exp(center - half), math.exp(center + half)))


def timed_lines(plan: ComparisonPlan) -> list[str]:
    """A line for every arm, such as "Timed mot: 104 ms a step (5 rounds, spread 3 %)"."""
    return [
        f"Timed {f'{size}, ' if size else ''}{arm}: {with_prefix(1e3 * of.median)} ms a step "
        f"({len(of.seconds)} rounds, spread {100 * of.spread:.0f} %)"
        for (size, arm), of in plan.timing.items()
    ]


def ratio_sentence(plan: ComparisonPlan, arm: str, size: str = "") -> str:
    """Say how long a step of an arm takes against one of the baseline; "" without timing rounds."""
    found = time_ratio(plan, arm, size)
    if found is None:
        return ""
    interval = f" ({ratio(found.interval.low)} to {ratio(found.interval.high)})" if found.interval else ""
    return (
        f"a step of {arm} takes {ratio(found.value)}{interval} times as long as one of "
        f"{plan.config.baseline}, over {len(found.per_seed)} timing rounds"
    )


def check_timed(plan: ComparisonPlan, where: str) -> None:
    """Raise ConfigError if timing rounds come first, which `where`, such as "motley submit", cannot make."""
    if any(run.round is not None for run in plan.first):
        raise ConfigError(
            f"{plan.path}: {where} makes no timing rounds, which need one machine to themselves, one run "
            f"after the other; call `motley compare {plan.path} --first-only` in a job on such a machine, "
            "then this again"
        )
