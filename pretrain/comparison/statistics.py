"""What two sets of loss curves say about each other: pure functions over arrays. Imports no torch.

Curves are (x, loss) pairs with x rising: optimizer steps, tokens, FLOPs or seconds. Runs of one seed read the
same data in the same order, so arms are compared in pairs, seed by seed: what the data order does to the loss
cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Float
from scipy import stats

Array = np.ndarray


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def covers(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class PairedDifference:
    """Other minus baseline, seed by seed. Negative: the other arm's loss is lower."""

    differences: tuple[float, ...]
    mean: float
    relative: float
    """mean / mean loss of the baseline."""
    interval: Interval | None
    """Of the mean; None with one seed: one difference says nothing about its own spread."""

    @property
    def detectable(self) -> bool:
        return self.interval is not None and not self.interval.covers(0.0)


@dataclass(frozen=True)
class Match:
    """How far the other curve had to go to be as low as the baseline at each of its points."""

    base_x: Float[Array, " points"]
    other_x: Float[Array, " points"]
    """First x at which the other curve is as low; nan where it never is, or was at its first point."""
    slope: float | None
    """s: least squares of other_x on base_x through the origin; 0.5 is half of the baseline's steps."""
    end_ratio: float | None
    """x of the other arm over x of the baseline at the lower loss that both reached; see `end_reached`."""
    end_reached: bool
    """True: the other arm reached the baseline's final loss. False: it did not, and end_ratio is read the
    other way round, as its own length over the point at which the baseline reached *its* final loss."""
    never_reached: int
    """Baseline points whose loss the other curve never reached: s is blind to them, so it flatters."""


@dataclass(frozen=True)
class RatioEstimate:
    """A ratio over the seeds: geometric mean, interval by Student's t on its logarithm."""

    value: float
    per_seed: tuple[float, ...]
    interval: Interval | None


@dataclass(frozen=True)
class Crossing:
    """The curves change places at x; `other_leads` tells who is lower after it."""

    x: float
    loss: float
    other_leads: bool


def smooth(y: Float[Array, " points"], window: int) -> Float[Array, " points"]:
    """Centred moving mean over `window` points (odd); at the ends the window shrinks symmetrically.

    Symmetric, so that a straight line passes unchanged and neither arm is shifted along x.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window = {window}: an odd number of points, 1 or more")
    half = window // 2
    total = np.concatenate(([0.0], np.cumsum(y)))
    index = np.arange(len(y))
    reach = np.minimum(half, np.minimum(index, len(y) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def student_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Interval of the mean of independent values by Student's t; None for fewer than two."""
    n = len(values)
    if n < 2:
        return None
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean - half, mean + half)


def paired_difference(
    base: Sequence[float], other: Sequence[float], confidence: float = 0.95
) -> PairedDifference:
    """Final losses of the two arms, one per seed and in the same order of seeds."""
    if len(base) != len(other) or not base:
        raise ValueError(f"{len(base)} baseline losses and {len(other)} of the other arm: pairs are needed")
    differences = tuple(b - a for a, b in zip(base, other, strict=True))
    mean = float(np.mean(differences))
    return PairedDifference(
        differences=differences,
        mean=mean,
        relative=mean / float(np.mean(base)),
        interval=student_interval(differences, confidence),
    )


def first_reach(x: Float[Array, " points"], y: Float[Array, " points"], level: float) -> float:
    """First x at which the curve is at or below `level`, linear between points; nan if never.

    nan also where the first point is below already: when it got there was not measured. A curve that starts
    exactly at the level is answered by its first x.
    """
    below = np.flatnonzero(y <= level)
    if not len(below):
        return math.nan
    i = int(below[0])
    if i == 0:
        return float(x[0]) if y[0] == level else math.nan
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - level) / (y[i - 1] - y[i]))


def match_curves(
    base_x: Float[Array, " base"],
    base_y: Float[Array, " base"],
    other_x: Float[Array, " other"],
    other_y: Float[Array, " other"],
    *,
    window: int = 1,
) -> Match:
    """Step matching (MoT, section 3.2.2, which leaves fit and smoothing open: here they are as in the
    module's names).

    With x in FLOPs or seconds it is compute or wall-clock matching.
    """
    ours, theirs = smooth(base_y, window), smooth(other_y, window)
    reached = np.array([first_reach(other_x, theirs, level) for level in ours])
    usable = np.isfinite(reached) & (base_x > 0)
    t, u = base_x[usable], reached[usable]
    end = float(reached[-1])
    end_reached = bool(ours[-1] >= theirs.min())
    if end_reached:
        end_ratio = end / float(base_x[-1]) if math.isfinite(end) else None
    else:
        back = first_reach(base_x, ours, float(theirs[-1]))
        end_ratio = float(other_x[-1]) / back if back > 0 else None
    return Match(
        base_x=base_x,
        other_x=reached,
        slope=float(t @ u / (t @ t)) if len(t) else None,
        end_ratio=end_ratio,
        end_reached=end_reached,
        never_reached=int((ours < theirs.min()).sum()),
    )


def ratio_over_seeds(ratios: Sequence[float | None], confidence: float = 0.95) -> RatioEstimate | None:
    """Average as logarithms: 0.5 and 2 are equally far from 1. None unless every seed has a ratio."""
    known = tuple(ratio for ratio in ratios if ratio is not None and ratio > 0)
    if len(known) < len(ratios) or not known:
        return None
    logs = [math.log(ratio) for ratio in known]
    spread = student_interval(logs, confidence)
    return RatioEstimate(
        value=math.exp(float(np.mean(logs))),
        per_seed=known,
        interval=Interval(math.exp(spread.low), math.exp(spread.high)) if spread else None,
    )


def bootstrap_slope(
    match: Match, *, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> Interval | None:
    """Percentile interval of s over the evaluations of one pair of runs, in blocks; None below 8 points.

    Neighbouring points of a curve are not independent, so blocks of about sqrt(points) are drawn
    (moving-block bootstrap, Kuensch 1989). It holds the wobble of the curves, not what another seed would
    have done.
    """
    usable = np.isfinite(match.other_x) & (match.base_x > 0)
    t, u = match.base_x[usable], match.other_x[usable]
    n = len(t)
    if n < 8:
        return None
    block = max(2, round(math.sqrt(n)))
    generator = np.random.Generator(np.random.Philox(seed))
    starts = generator.integers(0, n - block + 1, size=(resamples, -(-n // block)))
    index = (starts[:, :, None] + np.arange(block)).reshape(resamples, -1)[:, :n]
    slopes = (t[index] * u[index]).sum(axis=1) / (t[index] ** 2).sum(axis=1)
    low, high = np.quantile(slopes, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(low), float(high))


def crossings(
    x: Float[Array, " points"],
    base_y: Float[Array, " points"],
    other_y: Float[Array, " points"],
    noise: float = 0.0,
) -> tuple[Crossing, ...]:
    """Where the curves change places. A lead counts only once the gap exceeds `noise`, so that two curves
    that lie on each other do not cross at every wobble; the crossing is put at the last zero of the gap
    before that."""
    gap = other_y - base_y
    sign = np.where(gap > noise, 1, np.where(gap < -noise, -1, 0))
    sure = np.flatnonzero(sign)
    found = []
    for before, after in pairwise(sure):
        if sign[before] == sign[after]:
            continue
        i = max(k for k in range(before, after) if gap[k] * sign[after] <= 0)
        share = gap[i] / (gap[i] - gap[i + 1])
        found.append(
            Crossing(
                x=float(x[i] + share * (x[i + 1] - x[i])),
                loss=float(base_y[i] + share * (base_y[i + 1] - base_y[i])),
                other_leads=bool(sign[after] < 0),
            )
        )
    return tuple(found)


def together_from(x: Float[Array, " points"], gap: Float[Array, " points"], noise: float) -> float | None:
    """First x from which the curves lie on each other to the end: three in four of the gaps, three at least,
    are within `noise`. None if they never do."""
    within = np.abs(gap) <= noise
    for i in range(len(gap) - 2):
        if within[i] and within[i:].mean() >= 0.75:
            return float(x[i])
    return None


def gap_noise(gaps: Float[Array, "seeds points"], confidence: float = 0.95) -> Float[Array, " points"]:
    """Half width of the interval of the mean gap at each point over the seeds; zeros with one seed."""
    n = len(gaps)
    if n < 2:
        return np.zeros(gaps.shape[1])
    return stats.t.ppf(0.5 + confidence / 2, n - 1) * gaps.std(axis=0, ddof=1) / math.sqrt(n)


def wobble(gap: Float[Array, " points"]) -> float:
    """Standard deviation of the noise along a curve that is else smooth, from its second differences.

    The second difference of independent noise has 6 times its variance; the median keeps steep stretches out.
    0 below 5 points.
    """
    if len(gap) < 5:
        return 0.0
    return 1.4826 * float(np.median(np.abs(np.diff(gap, 2)))) / math.sqrt(6)


def gap_trend(x: Float[Array, " points"], gap: Float[Array, " points"], *, last_frac: float = 1 / 3) -> float:
    """Nats by which the gap moves as x doubles, fitted to the last part of x; nan below 3 points.

    Losses fall about as powers of x, so the gap is fitted against log2 x.
    """
    late = (x >= x[-1] * (1 - last_frac)) & (x > 0)
    if late.sum() < 3:
        return math.nan
    return float(np.polyfit(np.log2(x[late]), gap[late], 1)[0])
