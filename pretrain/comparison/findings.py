"""The findings of a comparison, from the curves of its runs: differences, step matching, crossings, costs.

This module imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from pretrain.comparison.config import ComparisonPlan
from pretrain.comparison.contrasts import weights
from pretrain.comparison.effects import Effect, effects
from pretrain.comparison.facts import Fact, facts_of
from pretrain.comparison.plan_file import Addition
from pretrain.comparison.results import (
    AXES,
    HELD_OUT,
    Curve,
    Fingerprints,
    RunResult,
    aligned,
    compare_fingerprints,
)
from pretrain.comparison.scope import Scope, scope_of
from pretrain.comparison.statistics import (
    Crossing,
    Match,
    RatioEstimate,
    crossings,
    gap_noise,
    gap_trend,
    match_curves,
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
    final: Effect
    """The difference of the final held-out losses."""
    differences: tuple[float, ...]
    """Final losses of the arm minus the baseline's, by seed that both have."""
    seeds: tuple[int, ...]
    """The seeds that both have."""
    base_loss: float
    """The baseline's mean final held-out loss over its runs, in nats per token."""
    other_loss: float
    """The arm's mean final held-out loss over its runs, in nats per token."""
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
    lost_more: str | None
    """The one of the two arms of which a larger share of the runs failed or diverged; None if neither."""

    @property
    def leader(self) -> str:
        """The arm whose estimated final loss is lower."""
        return self.arm if self.final.estimate < 0 else self.baseline

    @property
    def winner(self) -> str | None:
        """The arm that a verdict calls better.

        None where the difference is not decided, in exploratory contrasts, where the arms are not proven to
        have read the same data, and where the lower arm lost more of its runs.
        """
        decided = self.final.outcome in ("lower", "higher") and self.final.primary and self.same_data
        return self.leader if decided and self.lost_more != self.leader else None


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
    """The plan without the arms of which every run failed (`scope.failed`)."""
    scope: Scope
    results: tuple[RunResult, ...]
    """The runs in scope."""
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
    """The contrasts of every arm but the baseline with it: its modalities in order, then ALL."""
    effects: dict[tuple[str, str], Effect]
    """All effects by (contrast, modality or ALL), those between other arms and interactions included."""
    facts: tuple[Fact, ...]
    """Accuracies of facts in what the models generate; none unless evaluate.generate asked for them."""
    added: tuple[Addition, ...]
    """Runs that were added after others had finished. The level of the intervals is then nominal."""

    def runs(self, arm: str) -> tuple[RunResult, ...]:
        """The runs of an arm, in the order of the seeds."""
        return tuple(r for r in self.results if r.arm == arm)

    def pairs(self, arm: str) -> tuple[tuple[RunResult, RunResult], ...]:
        """The runs of the baseline and of an arm, by seed that both have."""
        base = {run.seed: run for run in self.runs(self.plan.config.baseline)}
        return tuple((base[run.seed], run) for run in self.runs(arm) if run.seed in base)

    def lost_more(self, contrast: str) -> str | None:
        """The arm of a contrast that lost a larger share of its runs than another arm of it; None if none."""
        arms = weights(self.plan.config.differences[contrast])
        return lost_more(self.plan, self.scope, list(arms))

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


def find(plan: ComparisonPlan, results: Sequence[RunResult], added: Sequence[Addition] = ()) -> Findings:
    """The findings of a comparison, to which runs may have been `added`.

    Raises ConfigError while no seed has been evaluated in all arms.
    """
    scope = scope_of(plan, results)
    plan = plan.without(scope.failed)
    in_scope = tuple(r for r in results if r.planned.name in scope.used)

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
    losses = {(arm, m): loss(arm, metric_name(m)) for arm in plan.arms for m in (*modalities, ALL)}
    all_effects = _effects(plan, scope, in_scope, losses, modalities)
    return Findings(
        plan=plan,
        scope=scope,
        results=in_scope,
        fingerprints=fingerprints,
        modalities=modalities,
        directions=directions,
        losses=losses,
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
            _contrast(
                plan, scope, in_scope, all_effects[arm, modality], losses, same_data=fingerprints.proven
            )
            for arm in plan.others
            for modality in (*modalities, ALL)
        ),
        effects=all_effects,
        facts=facts_of(plan, scope, in_scope),
        added=tuple(added),
    )


def lost_more(plan: ComparisonPlan, scope: Scope, arms: Sequence[str]) -> str | None:
    """The arm of which the largest share of the planned runs was lost; None if it is the same in all."""
    share = {
        arm: sum(scope.ends[r.name].lost for r in plan.runs if r.arm == arm)
        / sum(r.arm == arm for r in plan.runs)
        for arm in arms
    }
    worst = max(share, key=lambda arm: share[arm])
    return worst if share[worst] > min(share.values()) else None


def _effects(
    plan: ComparisonPlan,
    scope: Scope,
    results: Sequence[RunResult],
    losses: dict[tuple[str, str], ArmLoss],
    modalities: Sequence[str],
) -> dict[tuple[str, str], Effect]:
    """All effects, by (contrast, modality or ALL), from the final losses of all runs in scope."""
    by_run = _final_losses(results, losses)
    return effects(
        plan.config,
        [(run.arm, run.seed) for run in results],
        {m: [by_run[run.arm, run.seed, m] for run in results] for m in (*modalities, ALL)},
        family=modalities,
        interim=scope.interim,
        diverged=scope.diverged,
    )


def _final_losses(
    results: Sequence[RunResult], losses: dict[tuple[str, str], ArmLoss]
) -> dict[tuple[str, int, str], float]:
    """The final losses by (arm, seed, modality)."""
    seeds: dict[str, list[int]] = {}
    for run in results:
        seeds.setdefault(run.arm, []).append(run.seed)
    return {
        (arm, seed, modality): value
        for (arm, modality), loss in losses.items()
        for seed, value in zip(seeds[arm], loss.per_seed, strict=True)
    }


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
    final: Effect,
    losses: dict[tuple[str, str], ArmLoss],
    *,
    same_data: bool,
) -> Contrast:
    """The contrast of an arm with the baseline; its curves are those of the seeds that both have."""
    confidence, baseline, arm = plan.config.confidence, plan.config.baseline, final.contrast
    metric = metric_name(final.modality)
    both = (r for r in results if r.arm in (arm, baseline))
    curves = {(r.arm, r.seed): r.curve(metric, until=scope.until(r)) for r in both}
    seeds = tuple(seed for name, seed in curves if name == arm and (baseline, seed) in curves)
    base, other = ([curves[name, seed] for seed in seeds] for name in (baseline, arm))
    gaps = _gaps(base, other, at_flops=plan.config.match == "train_flops")
    gap, noise = gaps.mean(axis=0), gap_noise(gaps, confidence)
    tokens, base_mean = base[0].tokens, np.mean([c.values for c in base], axis=0)
    least = 2 * wobble(gap)
    return Contrast(
        arm=arm,
        baseline=baseline,
        modality=final.modality,
        final=final,
        differences=tuple(float(o.values[-1] - b.values[-1]) for b, o in zip(base, other, strict=True)),
        seeds=seeds,
        base_loss=losses[baseline, final.modality].mean,
        other_loss=losses[arm, final.modality].mean,
        matching={axis: _matching(base, other, axis, confidence) for axis in AXES},
        gap_tokens=tokens,
        gap=gap,
        gap_noise=noise,
        wobble=least,
        crossings=crossings(tokens, base_mean, base_mean + gap, least),
        together_from=together_from(tokens, gap, least),
        trend=gap_trend(tokens, gap),
        same_data=same_data,
        lost_more=lost_more(plan, scope, [arm, baseline]),
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
    )
