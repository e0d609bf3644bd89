"""Effects: the estimate of every contrast in every modality, with the interval that decides.

This module imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pretrain.comparison.config import CompareConfig, ComparisonPlan
from pretrain.comparison.contrasts import weights
from pretrain.comparison.simultaneous import (
    Design,
    Outcome,
    detectable_effects,
    fit,
    half_widths,
    local_level,
    outcome,
)
from pretrain.comparison.statistics import Interval

ENOUGH_RUNS = 3
"""Number of runs of each of its arms from which on a contrast has an interval. Fewer are an observation."""
PILOT_DEVIATION = {"text": 0.022, "image": 0.017, "speech": 0.045}
"""Standard deviation over seeds of the final loss, nats per token, in docs/results/sparse_family."""

Run = tuple[str, int]
"""Arm and seed."""


@dataclass(frozen=True)
class Effect:
    """One contrast in one modality; negative if the first arm's loss is lower."""

    contrast: str
    modality: str
    primary: bool
    """Whether it is one of the verdicts, whose intervals hold together."""
    estimate: float
    """In nats per token."""
    relative: float
    """The estimate over the mean loss of the baseline."""
    interval: Interval | None
    """None where an arm has fewer than ENOUGH_RUNS runs, and in an unfinished comparison."""
    outcome: Outcome | Literal["observation"]
    margin: float
    """Difference in nats below which arms are equivalent."""
    spreads_differ: bool
    """Whether an arm spreads farther over its seeds than the others, so that the interval is wider."""

    @property
    def within_margin(self) -> bool:
        """Whether the whole interval lies within the margin."""
        return self.interval is not None and max(-self.interval.low, self.interval.high) < self.margin


def design_of(config: CompareConfig, runs: Sequence[Run], contrasts: Sequence[str]) -> Design:
    """The design of runs and of contrasts by name."""
    arms = list(config.arms)
    seeds = sorted({seed for _, seed in runs})
    rows = np.zeros((len(contrasts), len(arms)))
    for row, name in zip(rows, contrasts, strict=True):
        for arm, weight in weights(config.differences[name]).items():
            row[arms.index(arm)] = weight
    return Design(
        np.array([arms.index(arm) for arm, _ in runs]),
        np.array([seeds.index(seed) for _, seed in runs]),
        rows,
    )


def effects(
    config: CompareConfig,
    runs: Sequence[Run],
    losses: Mapping[str, Sequence[float]],
    *,
    family: Sequence[str],
    interim: bool = False,
) -> dict[tuple[str, str], Effect]:
    """The effects by (contrast, modality), from the final losses by modality, given in the order of `runs`.

    `family`: the modalities whose intervals hold together; others are exploratory. An unfinished comparison
    (`interim`) has no intervals: a level is that of one look.
    """
    design = design_of(config, runs, list(config.differences))
    table = np.array([losses[modality] for modality in losses], float)
    estimates, single, joint, differ = _estimates(config, runs, table, design, len(family))
    has_interval = _enough(design) & (design.dof > 0) & (not interim)
    of_baseline = np.array([arm == config.baseline for arm, _ in runs])
    out = {}
    for o, modality in enumerate(losses):
        base = float(table[o, of_baseline].mean())
        for c, name in enumerate(config.differences):
            primary = name in config.verdicts and modality in family
            estimate, half = float(estimates[o, c]), float((joint if primary else single)[o, c])
            interval = Interval(estimate - half, estimate + half) if has_interval[c] else None
            margin = config.margin * base
            out[name, modality] = Effect(
                contrast=name,
                modality=modality,
                primary=primary,
                estimate=estimate,
                relative=estimate / base,
                interval=interval,
                outcome=outcome(interval.low, interval.high, config.margin * base)
                if interval
                else "observation",
                margin=margin,
                spreads_differ=bool(differ[o, c]),
            )
    return out


def _estimates(
    config: CompareConfig, runs: Sequence[Run], table: np.ndarray, design: Design, num_outcomes: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """By outcome and contrast: estimates, single and joint half widths, and whether spreads differ.

    Without a degree of freedom there are no half widths (nan), and the estimates are differences of means.
    """
    if design.dof == 0:
        means = table @ design.indicators[0] / design.num_runs
        unknown = np.full((len(table), len(design.weights)), np.nan)
        return means @ design.weights.T, unknown, unknown, np.zeros(unknown.shape, bool)
    fitted, alpha = fit(table, design), 1 - config.confidence
    level = local_level(design_of(config, runs, config.verdicts), alpha, num_outcomes)
    return fitted.estimates, half_widths(fitted, alpha), half_widths(fitted, level), fitted.spreads_differ


def _enough(design: Design) -> np.ndarray:
    """By contrast, whether each of its arms has ENOUGH_RUNS runs."""
    return ((design.weights == 0) | (design.num_runs >= ENOUGH_RUNS)).all(axis=1)


def detectable(plan: ComparisonPlan) -> dict[str, float] | None:
    """By modality of a known deviation, the smallest difference that the comparison is likely to decide.

    It is in nats per token, that of the largest primary contrast. None if there will be too few seeds.
    """
    config, modalities = plan.config, plan.runs[0].config.model.modalities
    design = design_of(config, [(run.arm, run.seed) for run in plan.runs], config.verdicts)
    if not _enough(design).all():
        return None
    level = local_level(design, 1 - config.confidence, len(modalities))
    largest = float(detectable_effects(design, level).max())
    deviation = PILOT_DEVIATION | config.pilot_deviation
    return {m: largest * deviation[m] for m in modalities if m in deviation}
