"""The size of least loss at a budget of FLOPs: the minimum of a quadratic in log N.

As in Hoffmann et al. (arXiv 2203.15556, approach 2). A minimum at the smallest or the largest size, or
beyond, is refused: that ladder does not show where the loss is least. The interval is of draws with the
residual deviation over seeds. Of 90 % intervals, 93 % hold the minimum of a known law; of such from three
runs a size drawn with replacement 77 % do. This module imports no torch.
"""

from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from pretrain.comparison.statistics import Interval, interval_of_draws

MIN_SIZES = 4
"""Number of sizes below which a quadratic is not fitted: three fit any three."""
DRAWS = 1_000

Array = np.ndarray


@dataclass(frozen=True)
class IsoFlopMinimum:
    """The size of least loss at one budget."""

    parameters: float
    """Active parameters, embedding and head left out."""
    loss: float
    """The quadratic's loss there, in nats per token."""
    interval: Interval | None
    """Of `parameters`, by itself; an end is 0 or inf where too many draws have no minimum between sizes."""


def isoflop_minimum(
    parameters: Float[Array, " runs"],
    loss: Float[Array, " runs"],
    *,
    deviation: float | None,
    dof: int,
    confidence: float,
    draws: int = DRAWS,
) -> IsoFlopMinimum:
    """The minimum over the runs of one budget. Raises ValueError, a sentence, if there is none to tell.

    Its interval comes from draws of the sizes' means, whose noise has the residual `deviation` of one run,
    itself drawn with its `dof` degrees of freedom; None: no interval.
    """
    sizes, member = np.unique(parameters, return_inverse=True)
    if len(sizes) < MIN_SIZES:
        raise ValueError(f"a minimum over sizes needs {MIN_SIZES} of them; there are {len(sizes)}")
    centre = float(np.log(sizes).mean())
    x, counts = np.log(sizes) - centre, np.bincount(member)
    means = np.bincount(member, weights=loss) / counts
    place = float(_vertex(x, means[None])[0])
    if not x[0] < place < x[-1]:
        side = "smallest" if place <= x[0] else "largest"
        raise ValueError(f"the loss is least at the {side} size or beyond it, so no minimum is told")
    least = float(np.polyval(np.polyfit(x, means, 2), place))
    found = IsoFlopMinimum(float(np.exp(place + centre)), least, None)
    if deviation is None:
        return found
    generator = np.random.Generator(np.random.Philox(0))
    scale = deviation * np.sqrt(dof / generator.chisquare(dof, (draws, 1)))
    drawn = _vertex(x, means + scale * generator.standard_normal((draws, len(sizes))) / np.sqrt(counts))
    # A draw without a minimum between the sizes lies beyond them, on the side of its lower end.
    drawn = np.where((drawn > x[0]) & (drawn < x[-1]), drawn, np.sign(drawn) * np.inf)
    inside = interval_of_draws(drawn, confidence)
    low, high = np.exp(centre + np.array([inside.low, inside.high]))
    return replace(found, interval=Interval(float(low), float(high)))


def _vertex(x: Float[Array, " sizes"], losses: Float[Array, "draws sizes"]) -> Float[Array, " draws"]:
    """Return where the fitted quadratic is least; -inf or inf, its lower side, where it has no minimum."""
    square, slope, _ = np.polyfit(x, losses.T, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(square > 0, -slope / (2 * square), -np.sign(slope) * np.inf)
