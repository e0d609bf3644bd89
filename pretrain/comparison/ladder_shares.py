"""s of a ladder: the share of the baseline's budget with which an arm reaches the baseline's final loss.

It is read between runs, not along one run: the final losses of the runs of one size make a curve over
budgets, each point of which has its whole learning-rate schedule behind it. Along one run, the faster arm is
read in the middle of its schedule, which is a bias of up to 10 % under a cosine. Between budgets, the
logarithm of the loss is interpolated over the logarithm of the budget by monotone cubic pieces (Fritsch and
Carlson 1980). Of power laws with a floor, at budgets 4 or 5 times apart, they give s to 8 %, where straight
lines give it up to 17 % too high; at budgets that double, to 0.5 % and 3 %. This module imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.interpolate import PchipInterpolator

from pretrain.comparison.statistics import Interval, interval_of_draws

DRAWS = 2_000
"""Draws of the noise, from which the interval of a share follows."""
_GRID = 256
"""Points between the smallest and the largest budget at which an interpolated curve is read."""
_SAME_LOG = 1e-12
"""Difference of logarithms below which two losses are equal: rounding."""


@dataclass(frozen=True)
class Curve:
    """The final losses of an arm over two budgets or more of one size."""

    x: Float[np.ndarray, " budgets"]
    """Tokens or training FLOPs of a run, rising."""
    loss: Float[np.ndarray, "*draws budgets"]
    """Mean over the seeds, in nats per token."""
    runs: Float[np.ndarray, " budgets"]
    """Number of runs that each mean is of."""

    def until(self, last: int) -> "Curve":
        """The curve up to the budget of index `last`."""
        return Curve(self.x[: last + 1], self.loss[..., : last + 1], self.runs[: last + 1])

    def reach(self, level: Float[np.ndarray, "*draws"]) -> Float[np.ndarray, "*draws"]:
        """The first budget at which the interpolated loss is at or below `level`; inf if it never is, 0 if it
        is at the smallest budget, where its crossing was not measured."""
        grid = np.linspace(math.log(self.x[0]), math.log(self.x[-1]), _GRID)
        values = PchipInterpolator(np.log(self.x), np.log(self.loss), axis=-1)(grid)
        excess = values - np.log(level)[..., None] - _SAME_LOG
        first = np.argmax(excess <= 0, axis=-1)
        before = np.take_along_axis(excess, np.maximum(first - 1, 0)[..., None], -1)[..., 0]
        after = np.take_along_axis(excess, first[..., None], -1)[..., 0]
        with np.errstate(divide="ignore", invalid="ignore"):
            inside = np.exp(grid[first] + (grid[1] - grid[0]) * (before / (before - after) - 1))
        inside = np.where(first == 0, 0.0, inside)
        return np.where((excess <= 0).any(axis=-1), inside, np.inf)


@dataclass(frozen=True)
class EqualLossShare:
    """The share of the baseline's budget that an arm takes to the baseline's final loss, such as 0.6.

    If the arm did not reach that loss, it is the arm's budget over that at which the baseline had the arm's
    final loss. Nothing is extrapolated beyond the smallest and the largest budget.
    """

    value: float
    """0: the arm was as low at its smallest budget already. inf: the baseline was."""
    interval: Interval | None
    """Holds by itself. An end that is 0 or inf lies outside the budgets that were run."""
    reached: bool
    """Whether the arm reached the baseline's final loss."""


def share_at_equal_loss(base: Curve, arm: Curve) -> Float[np.ndarray, "*draws"]:
    """The share at the last budget; 0 or inf where it lies outside the budgets."""
    level = base.loss[..., -1]
    reached = np.log(arm.loss).min(axis=-1) <= np.log(level) + _SAME_LOG
    forward = arm.reach(level) / base.x[-1]
    with np.errstate(divide="ignore"):
        backward = arm.x[-1] / base.reach(arm.loss[..., -1])
    return np.where(reached, forward, backward)


def equal_loss_share(
    base: Curve, arm: Curve, *, deviation: float | None, dof: int, confidence: float, draws: int = DRAWS
) -> EqualLossShare:
    """The share at the last budget of two curves.

    Its interval comes from draws of all means, whose noise has the residual `deviation` of one run, itself
    drawn with its `dof` degrees of freedom; None: no interval.
    """
    value, reached = float(share_at_equal_loss(base, arm)), bool(arm.loss.min() <= base.loss[-1])
    if deviation is None:
        return EqualLossShare(value, None, reached)
    generator = np.random.Generator(np.random.Philox(0))
    scale = deviation * np.sqrt(dof / generator.chisquare(dof, (draws, 1)))

    def drawn(curve: Curve) -> Curve:
        noise = generator.standard_normal((draws, len(curve.x))) / np.sqrt(curve.runs)
        # A loss is above 0, and so is its draw, however wide the noise.
        return Curve(curve.x, np.maximum(curve.loss + scale * noise, 1e-3 * curve.loss), curve.runs)

    shares = share_at_equal_loss(drawn(base), drawn(arm))
    return EqualLossShare(value, interval_of_draws(shares, confidence), reached)


@dataclass(frozen=True)
class Turn:
    """The turn of the sign of arm minus baseline as tokens per parameter grow, at one size."""

    estimate: float | None
    """Tokens per parameter at which the interpolated difference is zero for the last time; None: it has one
    sign at all budgets."""
    arm_leads_after: bool
    """Whether the arm's loss is lower at the largest budget."""
    last_against: float | None
    """Tokens per parameter of the last cell that decided for the other side; None if none did."""
    decided_for: tuple[float, ...]
    """Tokens per parameter of the cells after that which decided for the leader."""
    range: tuple[float, float]
    """The smallest and the largest tokens per parameter whose differences are used."""


def turn(x: Sequence[float], difference: Sequence[float], winner: Sequence[int]) -> Turn:
    """The turn of differences over rising tokens per parameter `x`.

    `winner`: by cell, -1 if the arm is decided to be better, 1 if the baseline is, 0 if neither is.
    """
    sign = 1 if difference[-1] > 0 else -1
    estimate = None
    for i in reversed(range(len(x) - 1)):
        if difference[i] * sign < 0:
            share = difference[i] / (difference[i] - difference[i + 1])
            estimate = math.exp(math.log(x[i]) + share * math.log(x[i + 1] / x[i]))
            break
    against = [i for i, who in enumerate(winner) if who == -sign]
    favours = [i for i, who in enumerate(winner) if who == sign and i > max(against, default=-1)]
    return Turn(
        estimate,
        sign < 0,
        x[against[-1]] if against else None,
        tuple(x[i] for i in favours),
        (x[0], x[-1]),
    )
