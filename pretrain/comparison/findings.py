"""The findings of a comparison, from the curves of its runs: differences, step matching, crossings, costs.

This module imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.arm_losses import ArmLoss, aligned_arm, arm_loss, with_documents
from pretrain.comparison.contrasts import weights
from pretrain.comparison.curve_pairs import Matching, gaps_along, match_pairs, pairs_of_curves
from pretrain.comparison.document_variance import DocumentLosses
from pretrain.comparison.effects import Effect, effects
from pretrain.comparison.facts import Fact, facts_of
from pretrain.comparison.foreign.question import ForeignPlan, Plan
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.plan_file import Addition
from pretrain.comparison.results import (
    AXES,
    CURVE_AXES,
    HELD_OUT,
    Curve,
    Fingerprints,
    RunResult,
    aligned,
    compare_fingerprints,
)
from pretrain.comparison.run_documents import paired_documents
from pretrain.comparison.scope import Scope, scope_of
from pretrain.comparison.statistics import (
    Crossing,
    crossings,
    gap_noise,
    gap_trend,
    together_from,
    wobble,
)
from pretrain.comparison.step_timing import over_rounds, time_ratio

Direction = tuple[str, str]
"""(a, b): b after a."""
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

    def never_reached(self, axis: str) -> bool:
        """Whether the arm did not reach all losses of the baseline."""
        return self.matching[axis].never_reached_frac > 0

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
class Findings:
    """Everything that a report states."""

    plan: Plan
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
    num_documents: int | None
    """Number of held-out documents whose variance is in the intervals; None if it is in none."""

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
    def outcomes(self) -> tuple[str, ...]:
        """The modalities that were evaluated, and ALL where the loss over all targets is known."""
        return (*self.modalities, *((ALL,) if (self.plan.config.baseline, ALL) in self.losses else ()))

    @property
    def deciding_metric(self) -> str:
        """Name of the metric that decides, by modality: eval/loss, or that of causal forms."""
        return "eval/loss" if isinstance(self.plan, ForeignPlan) else self.plan.config.deciding_metric

    @property
    def progress_axis(self) -> Literal["steps", "tokens"]:
        """The axis of step matching: tokens for foreign runs, whose steps may differ in size."""
        return "tokens" if isinstance(self.plan, ForeignPlan) else "steps"

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes of curves along which the positions of all runs are known."""
        metric = metric_name(self.modalities[0])
        curves = [run.curve(metric, until=self.scope.until(run)) for run in self.results]
        return tuple(axis for axis in CURVE_AXES if all(np.isfinite(c.x(axis)).all() for c in curves))

    @property
    def tokens(self) -> int:
        """Tokens of a run of the baseline, up to the end of the scope."""
        return round(self.scope.until_step * self.plan.tokens_per_step)


def find(plan: Plan, results: Sequence[RunResult], added: Sequence[Addition] = ()) -> Findings:
    """The findings of a comparison, to which runs may have been `added`.

    Raises ConfigError while no seed has been evaluated in all arms.
    """
    scope = scope_of(plan, results)
    plan = plan.without(scope.failed)
    in_scope = tuple(r for r in results if r.planned.name in scope.used)

    modalities, outcomes, directions = _measured(plan, scope, in_scope)
    loss = partial(_loss, scope, in_scope)
    stated = isinstance(plan, ForeignPlan) and plan.config.same_data
    fingerprints = compare_fingerprints(in_scope, stated=stated)
    look_ahead = [arm for arm, config in plan.run_configs.items() if not config.model.is_causal]
    documents = None if scope.interim else paired_documents(in_scope, outcomes, ALL)
    losses = {(arm, m): loss(arm, metric_name(m)) for arm in plan.arms for m in outcomes}
    if documents is not None:
        losses = {
            (arm, m): with_documents(one, documents[m].losses[[run.arm == arm for run in in_scope]])
            for (arm, m), one in losses.items()
        }
    own_rule = "eval/" if documents is None else "eval/documents/"
    all_effects = _effects(plan, scope, in_scope, losses, modalities, documents)
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
            (arm, m): loss(arm, metric_name(m).replace(HELD_OUT, own_rule))
            for arm in look_ahead
            for m in outcomes
        },
        contrasts=tuple(
            _contrast(
                plan, scope, in_scope, all_effects[arm, modality], losses, same_data=fingerprints.accepted
            )
            for arm in plan.others
            for modality in outcomes
        ),
        effects=all_effects,
        facts=facts_of(plan, scope, in_scope),
        added=tuple(added),
        num_documents=None if documents is None else len(documents[modalities[0]].targets),
    )


def _measured(
    plan: Plan, scope: Scope, results: Sequence[RunResult]
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[Direction, ...]]:
    """(modalities, these and ALL, directions) of which all runs in scope have losses."""

    def known(metric: str) -> bool:
        return all(len(run.curve(metric, until=scope.until(run))) for run in results)

    modalities = tuple(m for m in plan.modalities if known(metric_name(m)))
    if not modalities:
        late = [r.planned.name for r in results if not len(r.curve(r.total, until=scope.until(r)))]
        raise ConfigError(
            f"{plan.directory}: nothing to report on: runs are compared up to step {scope.until_step} of the "
            "baseline, the share of their steps that all have made, and no modality was evaluated in all of "
            f"them up to there; without an evaluation: {', '.join(late) or 'none'}"
        )
    outcomes = (*modalities, *((ALL,) if known(metric_name(ALL)) else ()))
    directions = tuple(
        d
        for d in results[0].directions()
        if known(conditional_loss_name(d)) and known(conditional_gain_name(d))
    )
    return modalities, outcomes, directions


def _loss(scope: Scope, results: Sequence[RunResult], arm: str, metric: str) -> ArmLoss:
    """The final values of a metric of the runs of an arm."""
    curves = [run.curve(metric, until=scope.until(run)) for run in results if run.arm == arm]
    return arm_loss(aligned_arm(arm, curves))


def lost_more(plan: Plan, scope: Scope, arms: Sequence[str]) -> str | None:
    """The arm of which the largest share of the planned runs was lost; None if it is the same in all."""
    share = {
        arm: sum(scope.ends[r.name].lost for r in plan.runs if r.arm == arm)
        / sum(r.arm == arm for r in plan.runs)
        for arm in arms
    }
    worst = max(share, key=lambda arm: share[arm])
    return worst if share[worst] > min(share.values()) else None


def _effects(
    plan: Plan,
    scope: Scope,
    results: Sequence[RunResult],
    losses: dict[tuple[str, str], ArmLoss],
    modalities: Sequence[str],
    documents: Mapping[str, DocumentLosses] | None,
) -> dict[tuple[str, str], Effect]:
    """All effects, by (contrast, modality or ALL), from the final losses of all runs in scope."""
    by_run = final_losses(results, losses)
    outcomes = dict.fromkeys(modality for _, modality in losses)
    return effects(
        plan.config,
        [(run.arm, run.seed) for run in results],
        {m: [by_run[run.arm, run.seed, m] for run in results] for m in outcomes},
        family=modalities,
        interim=scope.interim,
        diverged=scope.diverged,
        documents=documents,
    )


def final_losses(
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


def _matching(plan: Plan, arm: str, base: Sequence[Curve], other: Sequence[Curve]) -> dict[str, Matching]:
    """Step matching along all axes. Seconds of timing rounds hold the spread of these in their intervals."""
    confidence = plan.config.confidence
    matching = {axis: match_pairs(base, other, axis, confidence) for axis in AXES}
    if isinstance(plan, ComparisonPlan):
        rounds, seconds = time_ratio(plan, arm, plan.runs[0].size_arm[0]), matching["seconds"]
        matching["seconds"] = replace(
            seconds,
            slope=over_rounds(seconds.slope, rounds, confidence),
            end=over_rounds(seconds.end, rounds, confidence),
        )
    return matching


def _contrast(
    plan: Plan,
    scope: Scope,
    results: Sequence[RunResult],
    final: Effect,
    losses: dict[tuple[str, str], ArmLoss],
    *,
    same_data: bool,
) -> Contrast:
    """The contrast of an arm with the baseline; its curves are those of the seeds that both have."""
    by_run, metric = final_losses(results, losses), metric_name(final.modality)
    confidence, baseline, arm = plan.config.confidence, plan.config.baseline, final.contrast
    both = (r for r in results if r.arm in (arm, baseline))
    curves = {(r.arm, r.seed): r.curve(metric, until=scope.until(r)) for r in both}
    seeds, base, other = pairs_of_curves(curves, baseline, arm)
    at_equal = {"train_flops": "flops", "seconds": "seconds"}.get(plan.config.match, "tokens")
    tokens, base_mean, gaps = gaps_along(base, other, at_equal, arm)
    least = 2 * wobble(gap := gaps.mean(axis=0))
    return Contrast(
        arm=arm,
        baseline=baseline,
        modality=final.modality,
        final=final,
        differences=tuple(
            by_run[arm, seed, final.modality] - by_run[baseline, seed, final.modality] for seed in seeds
        ),
        seeds=seeds,
        base_loss=losses[baseline, final.modality].mean,
        other_loss=losses[arm, final.modality].mean,
        matching=_matching(plan, arm, base, other),
        gap_tokens=tokens,
        gap=gap,
        gap_noise=gap_noise(gaps, confidence),
        wobble=least,
        crossings=crossings(tokens, base_mean, base_mean + gap, least),
        together_from=together_from(tokens, gap, least),
        trend=gap_trend(tokens, gap),
        same_data=same_data,
        lost_more=lost_more(plan, scope, [arm, baseline]),
    )
