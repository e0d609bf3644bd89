"""The arms of a comparison cost time, memory, FLOPs and data. This module imports no torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.findings import Findings
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult
from pretrain.comparison.scope import Scope
from pretrain.comparison.statistics import RatioEstimate, ratio_over_seeds
from pretrain.comparison.step_timing import time_ratio


@dataclass(frozen=True)
class ArmSystem:
    """The cost of an arm; values are means over the seeds unless said otherwise."""

    tokens: float
    """Slots of the whole run, padding included."""
    step_s: float
    """Seconds of a step, median over the rows of a run."""
    tokens_per_s: float
    """Slots of the whole run over its seconds in steps and waits for data."""
    wait_frac: float
    mfu_frac: float | None
    peak_bytes: float
    """Largest peak over the seeds."""
    train_s: float
    train_flops: float
    flops_lost_to_spikes: float
    flops_per_target: float
    """Training FLOPs, but for lost ones, per target, a slot that holds a token."""
    fill_frac: float
    epochs: float


def systems(findings: Findings) -> dict[str, ArmSystem]:
    """The cost of every arm, from the rows of its runs."""
    return {arm: _system(findings.runs(arm), findings.scope) for arm in findings.plan.arms}


def _system(runs: Sequence[RunResult], scope: Scope) -> ArmSystem:
    def series(name: str) -> list[np.ndarray]:
        """The values of a metric in every run that has it."""
        curves = [run.curve(name, until=scope.until(run)).values for run in runs]
        return [values for values in curves if len(values)]

    def last(name: str) -> float:
        return _mean([float(values[-1]) for values in series(name)])

    def median(name: str) -> float:
        return _mean([_median_after_start(values) for values in series(name)])

    mfu, train_s, flops = median("speed/mfu_frac"), last("time/train_s"), last("compute/train_flops")
    step_s, wait_s = median("time/step_s"), median("time/data_wait_s")
    targets = _mean([_targets(run, scope) for run in runs])
    lost = _mean([run.lost("compute/lost_flops", until=scope.until(run)) for run in runs])
    return ArmSystem(
        tokens=last("tokens"),
        step_s=step_s,
        tokens_per_s=last("tokens") / train_s if train_s else math.nan,
        wait_frac=wait_s / (step_s + wait_s) if step_s else math.nan,
        mfu_frac=mfu if math.isfinite(mfu) else None,
        peak_bytes=max((float(values.max()) for values in series("memory/peak_bytes")), default=math.nan),
        train_s=train_s,
        train_flops=flops,
        flops_lost_to_spikes=lost,
        flops_per_target=(flops - lost) / targets if targets else math.nan,
        fill_frac=_mean([float(values.mean()) for values in series("data/fill_frac")]),
        epochs=last("data/epoch"),
    )


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite values; nan if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def _median_after_start(values: np.ndarray) -> float:
    """The median without the first row, which holds start-up (allocation, compilation), if there are more."""
    return float(np.median(values[1:] if len(values) > 1 else values))


def _targets(run: RunResult, scope: Scope) -> float:
    """Number of targets of all modalities that the run has learned from."""
    names = {name for row in run.rows for name in row if name.startswith("train/tokens/")}
    return sum(float(run.curve(name, until=scope.until(run)).values[-1]) for name in names)


def step_time_ratio(findings: Findings, arm: str) -> RatioEstimate | None:
    """The ratio of an arm's step time to the baseline's, over timing rounds; of runs made elsewhere that of
    the median steps, over the seeds. None where it is not known."""
    plan = findings.plan
    if isinstance(plan, ComparisonPlan):
        return time_ratio(plan, arm, plan.runs[0].size_arm[0])

    def median(run: RunResult) -> float | None:
        values = run.curve("time/step_s", until=findings.scope.until(run)).values
        return _median_after_start(values) if len(values) else None

    pairs = [(median(base), median(other)) for base, other in findings.pairs(arm)]
    ratios = [other / base if base and other else None for base, other in pairs]
    return ratio_over_seeds(ratios, findings.plan.config.confidence)
