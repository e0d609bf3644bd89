"""Contrasts between arms with simultaneous intervals, as pure functions. This module imports no torch.

The final loss of a run is the effect of its arm, plus the effect of its seed, plus a residual whose variance
all arms share. One fit per outcome (a modality) covers all finished runs, so that every arm helps to estimate
the residual variance. In a complete design, where every arm has every seed, this is a two-way analysis of
variance. Elsewhere (a run is missing, the baseline has more seeds) the effects of seeds are random with the
variance that the runs show (Henderson's third method), so that a seed of one arm alone counts too.

A decision is an interval that leaves out zero. The intervals of all primary contrasts in all outcomes hold
together: they use the maximum of correlated t statistics (Dunnett 1955; Hothorn, Bretz and Westfall 2008)
among contrasts, and Bonferroni among outcomes. Step-down procedures such as Holm's decide more only after
many decisions, and no informative interval agrees with them (Strassburger and Bretz 2008).
"""

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import optimize, stats

Array = np.ndarray
Outcome = Literal["lower", "higher", "equivalent", "inconclusive"]

SPREADS_DIFFER_P = 0.05
"""p of the one-sided F test below which an arm is said to spread farther than the other arms. Bartlett's test
of all arms at .1 has the same power for effects and misses more: a baseline that spreads 3 times as far (8
arms, 5 seeds) leads to a false claim in 19 % of comparisons with it, in 10 % with this."""
POWER = 0.8
"""Chance with which an effect of the detectable size is decided."""
_DRAWS = 200_000
"""Draws of the largest t statistic. The tail of 1.7 % has a standard error of 1.7 % of itself."""
_NODES = 2_000
_LARGEST_RATIO = 1e6


@dataclass(frozen=True)
class Design:
    """The runs that are compared, and the contrasts that are estimated from them."""

    arm: Int[Array, " runs"]
    """Index of each run's arm, from 0; every arm has a run."""
    seed: Int[Array, " runs"]
    """Index of each run's seed, from 0."""
    weights: Float[Array, "contrasts arms"]
    """Weights of the arms' mean losses in a contrast; each row sums to 0."""

    @property
    def num_runs(self) -> Int[Array, " arms"]:
        """Number of runs by arm."""
        return np.bincount(self.arm, minlength=self.weights.shape[1])

    @property
    def incidence(self) -> Int[Array, "arms seeds"]:
        """Number of runs of an arm and a seed."""
        table = np.zeros((self.weights.shape[1], self.seed.max() + 1), int)
        np.add.at(table, (self.arm, self.seed), 1)
        return table

    @property
    def indicators(self) -> tuple[Float[Array, "runs arms"], Float[Array, "runs seeds"]]:
        """Indicator matrices of arms and of seeds."""
        return np.eye(self.weights.shape[1])[self.arm], np.eye(self.seed.max() + 1)[self.seed]

    @property
    def dof(self) -> int:
        """Degrees of freedom of the residual variance; 0 if the runs cannot tell it."""
        return len(self.arm) - int(np.linalg.matrix_rank(np.hstack(self.indicators)))


def design_over(
    arms: Sequence[Hashable],
    seeds: Sequence[Hashable],
    runs: Iterable[tuple[Hashable, Hashable]],
    contrasts: Sequence[Mapping[Any, float]],
) -> Design:
    """The design of runs (arm, seed), whose numbers are places in `arms` and `seeds`.

    `contrasts`: the weights of arms in each; an arm that is left out has none.
    """
    number = {arm: i for i, arm in enumerate(arms)}
    table = np.zeros((len(contrasts), len(arms)))
    for row, of_contrast in zip(table, contrasts, strict=True):
        for arm, weight in of_contrast.items():
            row[number[arm]] = weight
    pairs = [(number[arm], seeds.index(seed)) for arm, seed in runs]
    return Design(np.array([arm for arm, _ in pairs]), np.array([seed for _, seed in pairs]), table)


@dataclass(frozen=True)
class Fit:
    """Estimates of all contrasts in all outcomes."""

    estimates: Float[Array, "outcomes contrasts"]
    errors: Float[Array, "outcomes contrasts"]
    """Standard errors from the pooled residual variance."""
    dof: int
    welch_errors: Float[Array, "outcomes contrasts"]
    """Standard errors from each arm's own variance over its runs."""
    welch_dof: Float[Array, "outcomes contrasts"]
    spreads_differ: Bool[Array, "outcomes contrasts"]
    """Whether an arm of the contrast spreads farther than the other arms; Welch's errors then count too."""
    deviation: Float[Array, " outcomes"]
    """Standard deviation of the residuals."""


def fit(losses: Float[Array, "outcomes runs"], design: Design) -> Fit:
    """The fit of loss ~ arm + seed in every outcome. The design must leave degrees of freedom."""
    arms, seeds = design.indicators
    both = np.hstack((arms, seeds))
    dof, seed_dof = design.dof, int(np.linalg.matrix_rank(both)) - arms.shape[1]
    if dof < 1:
        raise ValueError(f"{len(design.arm)} runs leave no degree of freedom for the residual variance")
    within_arms = np.eye(len(arms)) - arms @ np.linalg.pinv(arms)
    within_both = np.eye(len(arms)) - both @ np.linalg.pinv(both)
    squares, arm_squares = (((losses @ maker) ** 2).sum(axis=1) for maker in (within_both, within_arms))
    variance = squares / dof
    expected = float(np.trace(seeds.T @ within_arms @ seeds))
    ratio = np.zeros(len(losses))
    if seed_dof > 0:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.nan_to_num(((arm_squares - squares) / variance - seed_dof) / expected)
    estimates, unit = _weighted(losses, design, np.clip(ratio, 0, _LARGEST_RATIO))
    welch_errors, welch_dof = _welch(losses, design)
    return Fit(
        estimates=estimates,
        errors=np.sqrt(variance[:, None] * unit),
        dof=dof,
        welch_errors=welch_errors,
        welch_dof=welch_dof,
        spreads_differ=(spread_p(losses, design) < SPREADS_DIFFER_P) @ (design.weights.T != 0),
        deviation=np.sqrt(variance),
    )


def _weighted(
    losses: Float[Array, "outcomes runs"], design: Design, ratio: Float[Array, " outcomes"]
) -> tuple[Float[Array, "outcomes contrasts"], Float[Array, "outcomes contrasts"]]:
    """Estimates by generalised least squares, and their variances over the residual variance.

    `ratio` is the variance of the seeds' effects over the residual variance. In a complete design it cancels.
    """
    arms, seeds = design.indicators
    table = design.incidence
    shrink = ratio[:, None] / (1 + ratio[:, None] * table.sum(axis=0))
    information = np.diag(design.num_runs) - np.einsum("as,os,bs->oab", table, shrink, table)
    sums = losses @ arms - np.einsum("as,os,os->oa", table, shrink, losses @ seeds)
    covariance = np.linalg.inv(information)
    means = np.einsum("oab,ob->oa", covariance, sums)
    unit = np.einsum("ca,oab,cb->oc", design.weights, covariance, design.weights)
    return means @ design.weights.T, unit


def arm_variances(
    losses: Float[Array, "outcomes runs"], design: Design
) -> tuple[Float[Array, "outcomes arms"], Int[Array, " arms"]]:
    """Variances over the runs of every arm, and their degrees of freedom; nan for an arm of one run."""
    arms, _ = design.indicators
    centred = losses - (losses @ arms / design.num_runs) @ arms.T
    dof = design.num_runs - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        return (centred**2) @ arms / dof, dof


def _welch(
    losses: Float[Array, "outcomes runs"], design: Design
) -> tuple[Float[Array, "outcomes contrasts"], Float[Array, "outcomes contrasts"]]:
    """Standard errors from the arms' own variances, and Satterthwaite's degrees of freedom.

    An arm of one run has no variance of its own and takes that of all arms.
    """
    variances, dof = arm_variances(losses, design)
    several = dof > 0
    pooled = (variances[:, several] * dof[several]).sum(axis=1) / dof.sum() if several.any() else np.nan
    variances = np.where(several, variances, np.reshape(pooled, (-1, 1)))
    dof = np.where(several, dof, dof.sum())
    parts = design.weights**2 * (variances / design.num_runs)[:, None, :]
    total = parts.sum(axis=2)
    with np.errstate(divide="ignore", invalid="ignore"):
        satterthwaite = np.nan_to_num(total**2 / (parts**2 / dof).sum(axis=2), nan=1.0)
    return np.sqrt(total), satterthwaite


def spread_p(losses: Float[Array, "outcomes runs"], design: Design) -> Float[Array, "outcomes arms"]:
    """By arm, p of the one-sided F test of its variance over runs against that of all other arms.

    It is 1 where one of the two has no degree of freedom.
    """
    variances, dof = arm_variances(losses, design)
    squares = np.where(dof > 0, variances * dof, 0.0)
    others, others_dof = squares.sum(axis=1, keepdims=True) - squares, dof.sum() - dof
    with np.errstate(divide="ignore", invalid="ignore"):
        p = stats.f.sf(variances / (others / others_dof), dof, others_dof)
    return np.where((dof > 0) & (others_dof > 0), np.nan_to_num(p, nan=1.0), 1.0)


def local_level(design: Design, alpha: float, num_outcomes: int, *, draws: int = _DRAWS) -> float:
    """The level of one interval with which all contrasts in all outcomes hold together at 1 - alpha.

    It is a function of the design alone, so it is known before the first run. The correlations of contrasts
    are those without effects of seeds, which are exact in a complete design.
    """
    covariance = (design.weights / design.num_runs) @ design.weights.T
    deviation = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(deviation, deviation)
    if len(correlation) == 1:
        return alpha / num_outcomes
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.clip(values, 0, None))
    generator = np.random.Generator(np.random.Philox(0))
    largest = np.abs(generator.standard_normal((draws, len(root))) @ root.T).max(axis=1)
    largest /= np.sqrt(generator.chisquare(design.dof, draws) / design.dof)
    return 2 * float(stats.t.sf(np.quantile(largest, 1 - alpha / num_outcomes), design.dof))


def half_widths(
    fitted: Fit, level: float, documents: "OverDocuments | None" = None
) -> Float[Array, "outcomes contrasts"]:
    """Half widths of the intervals at a local level.

    Where an arm of the contrast spreads farther than the others, it is the larger of the pooled and Welch's.
    With `documents` the intervals hold what other documents would change too.
    """
    pooled = half_width(fitted.errors, np.array(fitted.dof), level, documents)
    welch = half_width(fitted.welch_errors, fitted.welch_dof, level, documents)
    return np.where(fitted.spreads_differ, np.maximum(pooled, welch), pooled)


@dataclass(frozen=True)
class OverDocuments:
    """The variance of estimates over the held-out documents, which all runs share."""

    variance: Float[Array, "outcomes contrasts"]
    dof: Int[Array, " outcomes"]
    """Number of documents with a target of the outcome, less one."""


def half_width(
    errors: Float[Array, "outcomes contrasts"], dof: Array, level: float, documents: OverDocuments | None
) -> Float[Array, "outcomes contrasts"]:
    """The half width from a standard error over runs and a variance over documents.

    The two are independent, so they add; the degrees of freedom of their sum are Satterthwaite's.
    """
    if documents is None:
        return stats.t.isf(level / 2, dof) * errors
    over_runs, over_documents = errors**2, documents.variance
    total = over_runs + over_documents
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = over_runs**2 / dof + over_documents**2 / documents.dof[:, None]
        total_dof = np.where(parts > 0, total**2 / parts, dof)
    return stats.t.isf(level / 2, total_dof) * np.sqrt(total)


def outcome(low: float, high: float, margin: float) -> Outcome:
    """What an interval of a difference says: its sign, or that it is smaller than `margin`, or nothing."""
    if high < 0:
        return "lower"
    if low > 0:
        return "higher"
    return "equivalent" if -margin < low and high < margin else "inconclusive"


def detectable_effects(design: Design, level: float, power: float = POWER) -> Float[Array, " contrasts"]:
    """By contrast, the difference that is decided with chance `power`, over the residual deviation."""
    critical = float(stats.t.isf(level / 2, design.dof))
    shares = (np.arange(_NODES) + 0.5) / _NODES
    bounds = critical * np.sqrt(stats.chi2.ppf(shares, design.dof) / design.dof)

    def shortfall(effect: float) -> float:
        """The noncentral t distribution, as a mean over residual variances; scipy's is nan far out."""
        return float((stats.norm.sf(bounds - effect) + stats.norm.cdf(-bounds - effect)).mean()) - power

    effect = optimize.brentq(shortfall, 0.0, 2 * float(bounds.max()) + 10)
    _, unit = _weighted(np.zeros((1, len(design.arm))), design, np.zeros(1))
    return float(effect) * np.sqrt(unit[0])  # type: ignore[arg-type]
