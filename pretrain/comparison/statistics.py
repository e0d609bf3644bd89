"""The statistics of loss curves of two arms, as pure functions: step matching, crossings, gaps.

A curve is pairs (x, loss) with rising x: optimizer steps, tokens, FLOPs or seconds. Curves are compared in
pairs, seed by seed. Final losses are compared in pretrain/comparison/simultaneous.py. This module imports no
torch.
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
    """A confidence interval."""

    low: float
    high: float


@dataclass(frozen=True)
class Match:
    """A match says, for every point of the baseline, where the other curve is first as low."""

    base_x: Float[Array, " points"]
    other_x: Float[Array, " points"]
    """First x at which the other curve is as low; nan if it never is, or if its first point already is."""
    slope: float | None
    """s, the least-squares slope of other_x on base_x through the origin; 0.5 means half the steps."""
    end_ratio: float | None
    """x of the other arm over x of the baseline, at the lowest loss that both reached; see `end_reached`."""
    end_reached: bool
    """Whether the other arm reached the baseline's final loss. If not, end_ratio is the whole length of the
    other arm over the x at which the baseline reached the other arm's final loss."""
    never_reached: int
    """Number of baseline points whose loss the other curve never reached. s ignores them, so it flatters."""


@dataclass(frozen=True)
class RatioEstimate:
    """The geometric mean of a ratio over the seeds, with an interval by Student's t on logarithms."""

    value: float
    per_seed: tuple[float, ...]
    interval: Interval | None


@dataclass(frozen=True)
class Crossing:
    """A crossing of two curves at x; `other_leads` says whether the other curve is lower after it."""

    x: float
    loss: float
    other_leads: bool


def smooth(y: Float[Array, " points"], window: int) -> Float[Array, " points"]:
    """Centred moving mean over `window` points (an odd number); at the ends the window shrinks.

    The window stays symmetric, so a straight line is unchanged and no curve is shifted along x.
    """
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window = {window}: an odd number of points, 1 or more")
    half = window // 2
    total = np.concatenate(([0.0], np.cumsum(y)))
    index = np.arange(len(y))
    reach = np.minimum(half, np.minimum(index, len(y) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def student_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Interval of the mean of independent values by Student's t; None for fewer than three values, whose
    interval would be wider than any difference."""
    n = len(values)
    if n < 3:
        return None
    mean = float(np.mean(values))
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean - half, mean + half)


def interval_of_draws(drawn: Sequence[float] | Float[Array, " draws"], confidence: float) -> Interval:
    """The interval between two draws that leaves out equal shares on both sides.

    Its ends are order statistics and no interpolation, which infinite draws would spoil.
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail], method="inverted_cdf")
    return Interval(float(low), float(high))


def first_reach(x: Float[Array, " points"], y: Float[Array, " points"], level: float) -> float:
    """First x at which the curve, linear between points, is at or below `level`; nan if it never is.

    It is also nan if the first point is below `level`, since the crossing was not measured. A curve that
    starts exactly at `level` gives its first x.
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
    """Step matching (MoT, arXiv 2411.04996, section 3.2.2, which leaves the fit and the smoothing open).

    With x in FLOPs or seconds it is compute or wall-clock matching.
    """
    base, other = smooth(base_y, window), smooth(other_y, window)
    reached = np.array([first_reach(other_x, other, level) for level in base])
    usable = np.isfinite(reached) & (base_x > 0)
    t, u = base_x[usable], reached[usable]
    end = float(reached[-1])
    end_reached = bool(base[-1] >= other.min())
    if end_reached:
        end_ratio = end / float(base_x[-1]) if math.isfinite(end) else None
    else:
        base_end = first_reach(base_x, base, float(other[-1]))
        end_ratio = float(other_x[-1]) / base_end if base_end > 0 else None
    return Match(
        base_x=base_x,
        other_x=reached,
        slope=float(t @ u / (t @ t)) if len(t) else None,
        end_ratio=end_ratio,
        end_reached=end_reached,
        never_reached=int((base < other.min()).sum()),
    )


def ratio_over_seeds(ratios: Sequence[float | None], confidence: float = 0.95) -> RatioEstimate | None:
    """The geometric mean of the seeds' ratios, for which 0.5 and 2 are equally far from 1.

    It is None unless every seed has a positive ratio.
    """
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


def crossings(
    x: Float[Array, " points"],
    base_y: Float[Array, " points"],
    other_y: Float[Array, " points"],
    noise: float = 0.0,
) -> tuple[Crossing, ...]:
    """The crossings of two curves.

    A lead counts only once the gap exceeds `noise`, so that curves that coincide do not cross with every bit
    of noise. The crossing is the last zero of the gap before that.
    """
    gap = other_y - base_y
    sign = np.where(gap > noise, 1, np.where(gap < -noise, -1, 0))
    clear = np.flatnonzero(sign)
    result = []
    for before, after in pairwise(clear):
        if sign[before] == sign[after]:
            continue
        i = max(k for k in range(before, after) if gap[k] * sign[after] <= 0)
        share = gap[i] / (gap[i] - gap[i + 1])
        result.append(
            Crossing(
                x=float(x[i] + share * (x[i + 1] - x[i])),
                loss=float(base_y[i] + share * (base_y[i + 1] - base_y[i])),
                other_leads=bool(sign[after] < 0),
            )
        )
    return tuple(result)


def together_from(x: Float[Array, " points"], gap: Float[Array, " points"], noise: float) -> float | None:
    """First x from which the curves coincide until the end; None if there is none.

    Curves coincide if at least three gaps, and three in four of all gaps, are within `noise`.
    """
    within = np.abs(gap) <= noise
    for i in range(len(gap) - 2):
        if within[i] and within[i:].mean() >= 0.75:
            return float(x[i])
    return None


def gap_noise(gaps: Float[Array, "seeds points"], confidence: float = 0.95) -> Float[Array, " points"]:
    """Half width of the interval of the mean gap over the seeds, per point; zeros below three seeds."""
    n = len(gaps)
    if n < 3:
        return np.zeros(gaps.shape[1])
    return stats.t.ppf(0.5 + confidence / 2, n - 1) * gaps.std(axis=0, ddof=1) / math.sqrt(n)


def wobble(gap: Float[Array, " points"]) -> float:
    """Standard deviation of the noise along an otherwise smooth curve, from its second differences.

    The second difference of independent noise has 6 times the variance of the noise; a median ignores steep
    parts of the curve. It is 0 below 5 points.
    """
    if len(gap) < 5:
        return 0.0
    return 1.4826 * float(np.median(np.abs(np.diff(gap, 2)))) / math.sqrt(6)


def gap_trend(x: Float[Array, " points"], gap: Float[Array, " points"], *, last_frac: float = 1 / 3) -> float:
    """Change of the gap in nats as x doubles, fitted to the last part of x; nan below 3 points.

    Losses fall roughly as powers of x, so the gap is fitted against log2 x.
    """
    late = (x >= x[-1] * (1 - last_frac)) & (x > 0)
    if late.sum() < 3:
        return math.nan
    return float(np.polyfit(np.log2(x[late]), gap[late], 1)[0])
