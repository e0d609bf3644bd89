"""From the runs' curves to what a report states: differences, step matching, crossings. Imports no torch."""

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
"""Stands beside the modalities for the loss of all targets together."""


def metric_name(modality: str) -> str:
    return f"{HELD_OUT}loss" if modality == ALL else f"{HELD_OUT}loss/{modality}"


def loss_of(direction: tuple[str, str]) -> str:
    """Metric of the loss of b after its own a."""
    return f"{HELD_OUT}loss/{direction[0]}_to_{direction[1]}"


def gain_of(direction: tuple[str, str]) -> str:
    """Metric of what b's own a saves over a foreign one."""
    return f"{HELD_OUT}gain/{direction[0]}_to_{direction[1]}"


@dataclass(frozen=True)
class Matching:
    """Step matching against one axis, over the seeds."""

    matches: tuple[Match, ...]
    """One per seed."""
    slope: RatioEstimate | None
    end: RatioEstimate | None
    within_run: Interval | None
    """One seed: interval of s from the wobble along its own curves; says nothing about other seeds."""

    @property
    def end_reached(self) -> bool:
        return all(m.end_reached for m in self.matches)

    @property
    def never_reached_frac(self) -> float:
        """Share of the baseline's points, over all seeds, whose loss the other arm never reached."""
        return sum(m.never_reached for m in self.matches) / sum(len(m.base_x) for m in self.matches)


@dataclass(frozen=True)
class Contrast:
    """One arm against the baseline, in one modality."""

    arm: str
    baseline: str
    modality: str
    final: PairedDifference
    base_loss: float
    """Mean final held-out loss over the seeds, nats per token; `other_loss` likewise."""
    other_loss: float
    matching: dict[str, Matching]
    """Axis ("steps", "flops", "seconds") -> matching."""
    gap_tokens: Float[np.ndarray, " points"]
    gap: Float[np.ndarray, " points"]
    """Other minus baseline at each evaluation, mean over the seeds."""
    gap_noise: Float[np.ndarray, " points"]
    """Half width of its interval; zeros with one seed."""
    wobble: float
    """Twice the noise along the gap: what a lead has to exceed to count."""
    crossings: tuple[Crossing, ...]
    together_from: float | None
    """Tokens from which the curves lie on each other until the end; None if they do not."""
    trend: float
    """Nats by which the gap moves as the tokens double, late in the run; nan with too few evaluations."""

    @property
    def leader(self) -> str:
        return self.arm if self.final.mean < 0 else self.baseline

    @property
    def winner(self) -> str | None:
        """The arm that is lower beyond seed noise; None: no detectable difference, or one seed."""
        return self.leader if self.final.detectable else None


@dataclass(frozen=True)
class ArmLoss:
    """Final held-out losses of an arm in a modality (or direction), over the seeds."""

    per_seed: tuple[float, ...]
    mean: float
    deviation: float | None
    """Standard deviation over seeds: the noise floor; None with one seed."""
    best: float
    best_tokens: float
    """Lowest mean loss over the run, and where: before the end if the arm has begun to overfit."""


@dataclass(frozen=True)
class Findings:
    plan: ComparisonPlan
    scope: Scope
    results: tuple[RunResult, ...]
    """Of the seeds in scope only."""
    fingerprints: Fingerprints
    modalities: tuple[str, ...]
    """In the vocabulary's order, those that were evaluated; without ALL."""
    directions: tuple[tuple[str, str], ...]
    losses: dict[tuple[str, str], ArmLoss]
    """(arm, modality or ALL)"""
    conditional: dict[tuple[str, str], ArmLoss]
    """(arm, metric name): heldout/loss/<a>_to_<b> and heldout/gain/<a>_to_<b>."""
    by_rule: dict[tuple[str, str], ArmLoss]
    """(arm that looks ahead, modality or ALL): under the rule that it was trained with, later tokens seen."""
    contrasts: tuple[Contrast, ...]
    """Per other arm: the modalities in order, then ALL."""

    def runs(self, arm: str) -> tuple[RunResult, ...]:
        return tuple(r for r in self.results if r.arm == arm)

    def curves(self, arm: str, metric: str) -> tuple[Curve, ...]:
        """One per seed, in the order of the seeds, at the steps that all have."""
        return aligned([r.curve(metric, until=self.scope.until(r)) for r in self.runs(arm)])

    def contrast(self, arm: str, modality: str) -> Contrast:
        return next(c for c in self.contrasts if (c.arm, c.modality) == (arm, modality))

    @property
    def seeds(self) -> tuple[int, ...]:
        return self.scope.seeds

    @property
    def tokens(self) -> int:
        """Of the baseline."""
        return self.scope.until_step * self.plan.runs[0].config.tokens_per_step


def find(plan: ComparisonPlan, results: Sequence[RunResult]) -> Findings:
    """All findings. Raises ConfigError while no seed has been evaluated in all arms."""
    scope = scope_of(plan, results)
    used = tuple(r for r in results if r.seed in scope.seeds)

    def measured(metric: str) -> bool:
        return all(len(run.curve(metric, until=scope.until(run))) for run in used)

    modalities = tuple(m for m in plan.runs[0].config.model.modalities if measured(metric_name(m)))
    directions = tuple(d for d in used[0].directions() if measured(loss_of(d)) and measured(gain_of(d)))

    def loss(arm: str, metric: str) -> ArmLoss:
        return _arm_loss(aligned([r.curve(metric, until=scope.until(r)) for r in used if r.arm == arm]))

    look_ahead = [arm for arm in plan.arms if not plan.run(arm, scope.seeds[0]).config.model.is_causal]
    return Findings(
        plan=plan,
        scope=scope,
        results=used,
        fingerprints=compare_fingerprints(used),
        modalities=modalities,
        directions=directions,
        losses={(arm, m): loss(arm, metric_name(m)) for arm in plan.arms for m in (*modalities, ALL)},
        conditional={
            (arm, name): loss(arm, name)
            for arm in plan.arms
            for direction in directions
            for name in (loss_of(direction), gain_of(direction))
        },
        by_rule={
            (arm, m): loss(arm, metric_name(m).replace(HELD_OUT, "eval/"))
            for arm in look_ahead
            for m in (*modalities, ALL)
        },
        contrasts=tuple(
            _contrast(plan, scope, used, arm, modality)
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
    plan: ComparisonPlan, scope: Scope, used: Sequence[RunResult], arm: str, modality: str
) -> Contrast:
    confidence = plan.config.confidence
    metric = metric_name(modality)
    base, other = (
        [r.curve(metric, until=scope.until(r)) for r in used if r.arm == name]
        for name in (plan.config.baseline, arm)
    )
    by_flops = plan.config.match == "train_flops"
    final = paired_difference(
        [float(c.values[-1]) for c in base], [float(c.values[-1]) for c in other], confidence
    )
    beside = [_at_flops(b, o) for b, o in zip(base, other, strict=True)] if by_flops else other
    gaps = np.array([o.values - b.values for b, o in zip(base, beside, strict=True)])
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
    )


def _at_flops(base: Curve, other: Curve) -> Curve:
    """`other` where it had spent the FLOPs of the points of `base`; its first value before its first."""
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
    """What an arm cost, over its runs: mean over the seeds unless said otherwise."""

    step_s: float
    """Median over the run's rows."""
    tokens_per_s: float
    """Slots over the whole run / seconds in steps and waits."""
    wait_frac: float
    mfu_frac: float | None
    peak_bytes: float
    """Largest over the seeds."""
    train_s: float
    train_flops: float
    flops_per_target: float
    """Training FLOPs / targets seen (slots that hold a token)."""
    fill_frac: float
    epochs: float


def systems(findings: Findings) -> dict[str, ArmSystem]:
    """Cost of every arm, from the runs' own rows."""
    return {arm: _system(findings.runs(arm), findings.scope) for arm in findings.plan.arms}


def _system(runs: Sequence[RunResult], scope: Scope) -> ArmSystem:
    def series(run: RunResult, name: str) -> np.ndarray:
        return run.curve(name, until=scope.until(run)).values

    def mean(values: Sequence[float]) -> float:
        known = [v for v in values if math.isfinite(v)]
        return float(np.mean(known)) if known else math.nan

    def last(name: str) -> float:
        return mean([float(v[-1]) for run in runs if len(v := series(run, name))])

    def median(name: str) -> float:
        # The first row holds start-up (allocation, compilation): dropped where there are more.
        return mean(
            [float(np.median(v[1:] if len(v) > 1 else v)) for run in runs if len(v := series(run, name))]
        )

    targets = mean(
        [
            sum(
                float(series(run, name)[-1])
                for name in {n for r in run.rows for n in r}
                if name.startswith("train/tokens/")
            )
            for run in runs
        ]
    )
    mfu, train_s, flops = median("speed/mfu_frac"), last("time/train_s"), last("compute/train_flops")
    step_s, wait_s = median("time/step_s"), median("time/data_wait_s")
    return ArmSystem(
        step_s=step_s,
        tokens_per_s=last("tokens") / train_s if train_s else math.nan,
        wait_frac=wait_s / (step_s + wait_s) if step_s else math.nan,
        mfu_frac=mfu if math.isfinite(mfu) else None,
        peak_bytes=max(
            (float(v.max()) for run in runs if len(v := series(run, "memory/peak_bytes"))), default=math.nan
        ),
        train_s=train_s,
        train_flops=flops,
        flops_per_target=flops / targets if targets else math.nan,
        fill_frac=mean([float(v.mean()) for run in runs if len(v := series(run, "data/fill_frac"))]),
        epochs=last("data/epoch"),
    )


def step_time_ratio(findings: Findings, arm: str) -> RatioEstimate | None:
    """Median step time of the arm over the baseline's, seed by seed."""

    def medians(name: str) -> list[float]:
        return [
            float(np.median(v[1:] if len(v) > 1 else v))
            for run in findings.runs(name)
            if len(v := run.curve("time/step_s", until=findings.scope.until(run)).values)
        ]

    base, other = medians(findings.plan.config.baseline), medians(arm)
    if len(base) != len(other) or not base:
        return None
    return ratio_over_seeds(
        [o / b for b, o in zip(base, other, strict=True)], findings.plan.config.confidence
    )
