"""Effects: the estimate of every contrast in every modality, with the interval that decides.

This module imports no torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from pretrain.comparison.contrasts import Difference, weights
from pretrain.comparison.document_variance import DocumentLosses, over_documents
from pretrain.comparison.foreign.question import Question
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.simultaneous import (
    Design,
    Outcome,
    design_over,
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
    """None in an unfinished comparison, and where an arm has fewer than ENOUGH_RUNS runs or all diverged."""
    outcome: Outcome | Literal["observation"]
    margin: float
    """Difference in nats below which arms are equivalent."""
    spreads_differ: bool
    """Whether an arm spreads farther over its seeds than the others, so that the interval is wider."""

    @property
    def within_margin(self) -> bool:
        """Whether the whole interval lies within the margin."""
        return self.interval is not None and max(-self.interval.low, self.interval.high) < self.margin


def design_of(config: Question, runs: Sequence[Run], contrasts: Sequence[str]) -> Design:
    """The design of runs and of contrasts by name, over the arms that have a run.

    Where arms share so few seeds that effects of seeds and residuals cannot be told apart, as in runs made
    elsewhere, a run's seed is part of its residual.
    """
    arms = [arm for arm in config.arms if any(arm == other for other, _ in runs)]
    seeds = sorted({seed for _, seed in runs})
    rows = [weights(config.differences[name]) for name in contrasts]
    design = design_over(arms, seeds, runs, rows)
    return design if design.dof else replace(design, seed=np.zeros_like(design.seed))


def effects(
    config: Question,
    runs: Sequence[Run],
    losses: Mapping[str, Sequence[float]],
    *,
    family: Sequence[str],
    interim: bool = False,
    diverged: Sequence[str] = (),
    documents: Mapping[str, DocumentLosses] | None = None,
) -> dict[tuple[str, str], Effect]:
    """The effects by (contrast, modality), from the final losses by modality, given in the order of `runs`.

    `family`: the modalities whose intervals hold together; others are exploratory. An unfinished comparison
    (`interim`) has no intervals: a level is that of one look. Arms of which every run `diverged` have none
    either, and their losses take no part in the fit. `documents`: by modality, the losses of every run on
    every held-out document, whose variance the intervals then hold too.
    """
    table = np.array([losses[modality] for modality in losses], float)
    kept = None if documents is None else [documents[modality] for modality in losses]
    fitted = _estimates(config, runs, table, len(family), diverged, kept)
    of_baseline = np.array([arm == config.baseline for arm, _ in runs])
    out = {}
    for o, modality in enumerate(losses):
        base = float(table[o, of_baseline].mean())
        for name, (estimates, single, joint, differ) in fitted.items():
            primary = name in config.verdicts and modality in family
            estimate, half = float(estimates[o]), float((joint if primary else single)[o])
            undecided = interim or not math.isfinite(half)
            interval = None if undecided else Interval(estimate - half, estimate + half)
            margin = config.margin * base
            found = outcome(interval.low, interval.high, margin) if interval else "observation"
            out[name, modality] = Effect(
                contrast=name, modality=modality, primary=primary,
                estimate=estimate, relative=estimate / base if base else math.nan,
                interval=interval, outcome=found, margin=margin, spreads_differ=bool(differ[o]),
            )  # fmt: skip
    return out


def _estimates(
    config: Question,
    runs: Sequence[Run],
    table: np.ndarray,
    num_outcomes: int,
    diverged: Sequence[str],
    documents: Sequence[DocumentLosses] | None,
) -> dict[str, tuple[np.ndarray, ...]]:
    """By contrast, for every outcome: estimates, single and joint half widths, and whether spreads differ.

    Without a fit there are no half widths (nan), and an estimate is a difference of means.
    """
    sound = np.array([arm not in diverged for arm, _ in runs])
    means = {
        arm: table[:, [arm == other for other, _ in runs]].mean(axis=1) for arm in {arm for arm, _ in runs}
    }
    nothing, alike = np.full(len(table), np.nan), np.zeros(len(table), bool)
    out: dict[str, tuple[np.ndarray, ...]] = {
        name: (_total(means, difference), nothing, nothing, alike)
        for name, difference in config.differences.items()
    }
    names = [name for name, d in config.differences.items() if not set(weights(d)) & set(diverged)]
    of_fit = [run for run, counts in zip(runs, sound, strict=True) if counts]
    if not names or (design := design_of(config, of_fit, names)).dof == 0:
        return out
    fitted, alpha = fit(table[:, sound], design), 1 - config.confidence
    over = None if documents is None else over_documents([one.of_runs(sound) for one in documents], design)
    verdicts = [name for name in names if name in config.verdicts]
    single = half_widths(fitted, alpha, over)
    joint = single
    if verdicts:
        level = local_level(design_of(config, of_fit, verdicts), alpha, num_outcomes)
        joint = half_widths(fitted, level, over)
    few = ~enough_runs(design)
    single, joint = np.where(few, np.nan, single), np.where(few, np.nan, joint)
    for c, name in enumerate(names):
        out[name] = tuple(part[:, c] for part in (fitted.estimates, single, joint, fitted.spreads_differ))
    return out


def _total(means: Mapping[str, np.ndarray], difference: Difference) -> np.ndarray:
    """The difference of the arms' mean losses, by outcome."""
    return np.sum([weight * means[arm] for arm, weight in weights(difference).items()], axis=0)


def enough_runs(design: Design) -> np.ndarray:
    """By contrast, whether each of its arms has ENOUGH_RUNS runs."""
    return ((design.weights == 0) | (design.num_runs >= ENOUGH_RUNS)).all(axis=1)


def detectable(plan: ComparisonPlan) -> dict[str, float] | None:
    """By modality of a known deviation, the smallest difference that the comparison is likely to decide.

    It is in the unit of the modality, that of the largest primary contrast. None if there will be too few
    seeds.
    """
    runs = [(run.arm, run.seed) for run in plan.runs]
    return detectable_in(design_of(plan.config, runs, plan.config.verdicts), plan)


def detectable_in(design: Design, plan: ComparisonPlan) -> dict[str, float] | None:
    """`detectable` of a design, which holds the primary contrasts of the plan alone."""
    config, modalities = plan.config, plan.runs[0].config.model.modalities
    if not enough_runs(design).all():
        return None
    level = local_level(design, 1 - config.confidence, len(modalities))
    largest = float(detectable_effects(design, level).max())
    known = {m: nats for m, nats in PILOT_DEVIATION.items() if m not in plan.vector_modalities}
    deviation = known | config.pilot_deviation
    return {m: largest * deviation[m] for m in modalities if m in deviation}
