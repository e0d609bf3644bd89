"""Curves of two arms are laid beside each other, also where they were evaluated at other points.

This module imports no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.results import Curve, aligned
from pretrain.comparison.statistics import Match, RatioEstimate, match_curves, ratio_over_seeds

TOLERANCE = 0.01
"""Share by which a curve may end before a point, and still give its last value there: budgets that are within
it count as equal."""


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


def pairs_of_curves(
    curves: Mapping[tuple[str, int], Curve], baseline: str, arm: str
) -> tuple[tuple[int, ...], tuple[Curve, ...], tuple[Curve, ...]]:
    """(seeds that both arms have, the baseline's curves, the arm's curves), from curves by (arm, seed).

    The curves of an arm are cut to their common steps. Arms without a common seed have no pairs of runs: each
    gives one curve then, the mean over its seeds.
    """
    seeds = tuple(seed for name, seed in curves if name == arm and (baseline, seed) in curves)
    if seeds:
        base, other = (aligned([curves[name, seed] for seed in seeds]) for name in (baseline, arm))
        return seeds, base, other
    means = [mean_curve([c for (a, _), c in curves.items() if a == name]) for name in (baseline, arm)]
    return (), (means[0],), (means[1],)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean of several curves at their common steps."""
    common = aligned(curves)
    columns = ("steps", "tokens", "flops", "seconds", "values")
    return Curve(**{name: np.mean([getattr(c, name) for c in common], axis=0) for name in columns})


def gaps_along(
    base: Sequence[Curve], other: Sequence[Curve], axis: str, arm: str
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"], Float[np.ndarray, "pairs points"]]:
    """(tokens of the baseline, its mean loss, the arm's losses minus the baseline's by pair) where the curves
    of both arms are known along `axis`. `arm`: name of the arm whose curves are `other`.

    An arm's loss between its evaluations is that of the straight line. Raises ConfigError where no evaluation
    of the baseline lies in the arm's range.
    """
    known = np.ones(len(base[0]), bool)
    for one, another in zip(base, other, strict=True):
        x, theirs = one.x(axis), another.x(axis)
        known &= (x >= theirs[0] * (1 - TOLERANCE)) & (x <= theirs[-1] * (1 + TOLERANCE))
    if not known.any():
        x, theirs = base[0].x(axis), other[0].x(axis)
        raise ConfigError(
            f"the baseline was evaluated from {x[0]:g} to {x[-1]:g} {axis} and {arm} from "
            f"{theirs[0]:g} to {theirs[-1]:g}: they have no {axis} in common; leave the arm out"
        )
    gaps = [
        np.interp(b.x(axis)[known], o.x(axis), o.values) - b.values[known]
        for b, o in zip(base, other, strict=True)
    ]
    return base[0].tokens[known], np.mean([b.values for b in base], axis=0)[known], np.array(gaps)


def match_pairs(base: Sequence[Curve], other: Sequence[Curve], axis: str, confidence: float) -> Matching:
    """Step matching of every pair of curves along an axis."""
    matches = tuple(
        match_curves(b.x(axis), b.values, o.x(axis), o.values) for b, o in zip(base, other, strict=True)
    )
    return Matching(
        matches=matches,
        slope=ratio_over_seeds([m.slope for m in matches], confidence),
        end=ratio_over_seeds([m.end_ratio for m in matches], confidence),
    )
