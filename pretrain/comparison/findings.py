"""The findings of a comparison, from the curves of its runs: differences, step matching, crossings, costs.

This module imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from pretrain.comparison.config import ComparisonPlan
from pretrain.comparison.results import (
    AXES,
    HELD_OUT,
    Curve,
    Fingerprints,
    RunResult,
    Scope,
    aligned,
    compare_fingerprints,
    scope_of,
)
from pretrain.comparison.statistics import (
    Crossing,
    Interval,
    Match,
    PairedDifference,
    RatioEstimate,
    bootstrap_slope,
    crossings,
    gap_noise,
    gap_trend,
    match_curves,
    paired_difference,
    ratio_over_seeds,
    together_from,
    wobble,
)

ALL = "all"
"""Name that stands, beside the names of modalities, for all targets together."""


def metric_name(modality: str) -> str:
    """Name of the held-out loss of a modality, or of ALL."""
    return f"{HELD_OUT}loss" if modality == ALL else f"{HELD_OUT}loss/{modality}"


def conditional_loss_name(direction: tuple[str, str]) -> str:
    """Name of the loss of b after its own a, for a direction (a, b)."""
    return f"{HELD_OUT}loss/{direction[0]}_to_{direction[1]}"


def conditional_gain_name(direction: tuple[str, str]) -> str:
    """Name of the loss of b after a foreign a minus the loss after its own a, for a direction (a, b)."""
    return f"{HELD_OUT}gain/{direction[0]}_to_{direction[1]}"


@dataclass(frozen=True)
class Matching:
    """Step matching along one axis, over the seeds."""

    matches: tuple[Match, ...]
    """One match per seed."""
    slope: RatioEstimate | None
    end: RatioEstimate | None
    within_run: Interval | None
    """With one seed: interval of s from the noise along the curves, which says nothing about other seeds."""

    @property
    def end_reached(self) -> bool:
        """Whether the other arm reached the baseline's final loss in all seeds."""
        return all(m.end_reached for m in self.matches)

    @property
    def never_reached_frac(self) -> float:
        """Share of the baseline's evaluations, over all seeds, whose loss the other arm never reached."""
        return sum(m.never_reached for m in self.matches) / sum(len(m.base_x) for m in self.matches)


@dataclass(frozen=True)
class Contrast:
    """The comparison of one arm with the baseline, in one modality."""

    arm: str
    baseline: str
    modality: str
    final: PairedDifference
    base_loss: float
    """The baseline's mean final held-out loss over the seeds, in nats per token."""
    other_loss: float
    """The arm's mean final held-out loss over the seeds, in nats per token."""
    matching: dict[str, Matching]
    """Step matching by axis: "steps", "flops", "seconds"."""
    gap_tokens: Float[np.ndarray, " points"]
    gap: Float[np.ndarray, " points"]
    """Loss of the arm minus the baseline's at every evaluation, mean over the seeds."""
    gap_noise: Float[np.ndarray, " points"]
    """Half width of the interval of the gap; zeros with one seed."""
    wobble: float
    """Twice the noise along the gap. A lead counts only above this."""
    crossings: tuple[Crossing, ...]
    together_from: float | None
    """Tokens from which the curves coincide until the end; None if they do not."""
    trend: float
    """Change of the gap in nats as tokens double, late in the run; nan with too few evaluations."""
    same_data: bool
    """Whether the arms are proven to have read the same data, without which nothing is decided."""

    @property
    def leader(self) -> str:
        """The arm whose mean final loss is lower."""
        return self.arm if self.final.mean < 0 else self.baseline

    @property
    def winner(self) -> str | None:
        """The arm that is detectably lower; None without a detectable difference, as with one seed, and where
        the arms are not proven to have read the same data."""
        return self.leader if self.same_data and self.final.detectable else None


@dataclass(frozen=True)
class ArmLoss:
    """Final held-out losses of an arm in a modality or direction, over the seeds."""

    per_seed: tuple[float, ...]
    mean: float
    deviation: float | None
    """Standard deviation over the seeds; None with one seed."""
    best: float
    best_tokens: float
    """Tokens at which the mean loss was lowest (`best`): before the end if the arm has begun to overfit."""


@dataclass(frozen=True)
class Findings:
    """Everything that a report states."""

    plan: ComparisonPlan
    scope: Scope
    results: tuple[RunResult, ...]
    """The runs of the seeds in scope."""
    fingerprints: Fingerprints
    modalities: tuple[str, ...]
    """The modalities that were evaluated, in the vocabulary's order, without ALL."""
    directions: tuple[tuple[str, str], ...]
    """Pairs (a, b) of modalities with a conditional loss of b after a."""
    losses: dict[tuple[str, str], ArmLoss]
    """Final losses by (arm, modality or ALL)."""
    conditional: dict[tuple[str, str], ArmLoss]
    """Final values of heldout/loss/<a>_to_<b> and heldout/gain/<a>_to_<b> by (arm, metric name)."""
    by_rule: dict[tuple[str, str], ArmLoss]
    """Final losses under the rule of training, by (arm, modality or ALL), for arms that look ahead."""
    contrasts: tuple[Contrast, ...]
    """The contrasts of every arm but the baseline: its modalities in order, then ALL."""

    def runs(self, arm: str) -> tuple[RunResult, ...]:
        """The runs of an arm, in the order of the seeds."""
        return tuple(r for r in self.results if r.arm == arm)

    def curves(self, arm: str, metric: str) -> tuple[Curve, ...]:
        """The curve of every seed, in order, at the steps that all of them have."""
        return aligned([r.curve(metric, until=self.scope.until(r)) for r in self.runs(arm)])

    def contrast(self, arm: str, modality: str) -> Contrast:
        return next(c for c in self.contrasts if (c.arm, c.modality) == (arm, modality))

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.scope.seeds

    @property
    def tokens(self) -> int:
        """Tokens of a run of the baseline, up to the end of the scope."""
        return self.scope.until_step * self.plan.runs[0].config.tokens_per_step


def find(plan: ComparisonPlan, results: Sequence[RunResult]) -> Findings:
    """The findings of a comparison. Raises ConfigError while no seed has been evaluated in all arms."""
    scope = scope_of(plan, results)
    in_scope = tuple(r for r in results if r.seed in scope.seeds)

    def measured(metric: str) -> bool:
        return all(len(run.curve(metric, until=scope.until(run))) for run in in_scope)

    modalities = tuple(m for m in plan.runs[0].config.model.modalities if measured(metric_name(m)))
    directions = tuple(
        d
        for d in in_scope[0].directions()
        if measured(conditional_loss_name(d)) and measured(conditional_gain_name(d))
    )

    def loss(arm: str, metric: str) -> ArmLoss:
        return _arm_loss(aligned([r.curve(metric, until=scope.until(r)) for r in in_scope if r.arm == arm]))

    fingerprints = compare_fingerprints(in_scope)
    look_ahead = [arm for arm in plan.arms if not plan.run(arm, scope.seeds[0]).config.model.is_causal]
    return Findings(
        plan=plan,
        scope=scope,
        results=in_scope,
        fingerprints=fingerprints,
        modalities=modalities,
        directions=directions,
        losses={(arm, m): loss(arm, metric_name(m)) for arm in plan.arms for m in (*modalities, ALL)},
        conditional={
            (arm, name): loss(arm, name)
            for arm in plan.arms
            for direction in directions
            for name in (conditional_loss_name(direction), conditional_gain_name(direction))
        },
        by_rule={
            (arm, m): loss(arm, metric_name(m).replace(HELD_OUT, "eval/"))
            for arm in look_ahead
            for m in (*modalities, ALL)
        },
        contrasts=tuple(
            _contrast(plan, scope, in_scope, arm, modality, same_data=fingerprints.proven)
            for arm in plan.others
            for modality in (*modalities, ALL)
        ),
    )


def _arm_loss(curves: Sequence[Curve]) -> ArmLoss:
    final = tuple(float(c.values[-1]) for c in curves)
    mean_curve = np.mean([c.values for c in curves], axis=0)
    best = int(np.argmin(mean_curve))
    return ArmLoss(
        per_seed=final,
        mean=float(np.mean(final)),
        deviation=float(np.std(final, ddof=1)) if len(final) > 1 else None,
        best=float(mean_curve[best]),
        best_tokens=float(curves[0].tokens[best]),
    )


def _contrast(
    plan: ComparisonPlan,
    scope: Scope,
    results: Sequence[RunResult],
    arm: str,
    modality: str,
    *,
    same_data: bool,
) -> Contrast:
    confidence = plan.config.confidence
    metric = metric_name(modality)
    base, other = (
        [r.curve(metric, until=scope.until(r)) for r in results if r.arm == name]
        for name in (plan.config.baseline, arm)
    )
    final = paired_difference(
        [float(c.values[-1]) for c in base], [float(c.values[-1]) for c in other], confidence
    )
    gaps = _gaps(base, other, at_flops=plan.config.match == "train_flops")
    gap, noise = gaps.mean(axis=0), gap_noise(gaps, confidence)
    tokens, base_mean = base[0].tokens, np.mean([c.values for c in base], axis=0)
    least = 2 * wobble(gap)
    return Contrast(
        arm=arm,
        baseline=plan.config.baseline,
        modality=modality,
        final=final,
        base_loss=float(np.mean([c.values[-1] for c in base])),
        other_loss=float(np.mean([c.values[-1] for c in other])),
        matching={axis: _matching(base, other, axis, confidence) for axis in AXES},
        gap_tokens=tokens,
        gap=gap,
        gap_noise=noise,
        wobble=least,
        crossings=crossings(tokens, base_mean, base_mean + gap, least),
        together_from=together_from(tokens, gap, least),
        trend=gap_trend(tokens, gap),
        same_data=same_data,
    )


def _gaps(
    base: Sequence[Curve], other: Sequence[Curve], *, at_flops: bool
) -> Float[np.ndarray, "seeds points"]:
    """The loss of the arm minus the baseline's, at equal steps or at equal FLOPs."""
    if at_flops:
        other = [_at_flops(b, o) for b, o in zip(base, other, strict=True)]
    return np.array([o.values - b.values for b, o in zip(base, other, strict=True)])


def _at_flops(base: Curve, other: Curve) -> Curve:
    """`other`, interpolated where it had spent the FLOPs of the points of `base`."""
    return replace(base, values=np.interp(base.flops, other.flops, other.values))


def _matching(base: Sequence[Curve], other: Sequence[Curve], axis: str, confidence: float) -> Matching:
    matches = tuple(
        match_curves(b.x(axis), b.values, o.x(axis), o.values) for b, o in zip(base, other, strict=True)
    )
    return Matching(
        matches=matches,
        slope=ratio_over_seeds([m.slope for m in matches], confidence),
        end=ratio_over_seeds([m.end_ratio for m in matches], confidence),
        within_run=bootstrap_slope(matches[0], confidence=confidence) if len(matches) == 1 else None,
    )


# --------------------------------------------------------------------------------------------------- systems


@dataclass(frozen=True)
class ArmSystem:
    """The cost of an arm; values are means over the seeds unless said otherwise."""

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
    """The ratio of an arm's median step time to the baseline's, over the seeds; None if one is unknown."""

    def medians(name: str) -> list[float]:
        return [
            _median_after_start(values)
            for run in findings.runs(name)
            if len(values := run.curve("time/step_s", until=findings.scope.until(run)).values)
        ]

    base, other = medians(findings.plan.config.baseline), medians(arm)
    if len(base) != len(other) or not base:
        return None
    return ratio_over_seeds(
        [o / b for b, o in zip(base, other, strict=True)], findings.plan.config.confidence
    )
