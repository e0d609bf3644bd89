"""The size of least loss at a budget of FLOPs."""

import numpy as np
import pytest

from pretrain.comparison.isoflop import IsoFlopMinimum, isoflop_minimum
from tests.ladders import LAW

FLOPS = 1.2e12
SIZES = np.array([1.5e4, 3e4, 6e4, 1.2e5, 2.4e5])
E, A, B, ALPHA, BETA = LAW.named().values()
BEST = (ALPHA * A / (BETA * B) * (FLOPS / 6) ** BETA) ** (1 / (ALPHA + BETA))
"""Where the loss of LAW is least, for 6 FLOPs per parameter and token."""


def runs(seed: int, deviation: float, sizes: np.ndarray = SIZES) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and losses of three runs of every size."""
    parameters = np.repeat(sizes, 3)
    noise = np.random.Generator(np.random.Philox(seed)).standard_normal(len(parameters))
    return parameters, LAW.loss(parameters, FLOPS / 6 / parameters) + deviation * noise


def test_the_minimum_of_a_known_law_lies_in_its_interval() -> None:
    held = 0
    for seed in range(100):
        parameters, loss = runs(seed, 0.004)
        deviation = float(np.sqrt(loss.reshape(-1, 3).var(axis=1, ddof=1).mean()))
        found = isoflop_minimum(parameters, loss, deviation=deviation, dof=10, confidence=0.9, draws=400)
        assert found.interval is not None
        held += found.interval.low <= BEST <= found.interval.high
    # 90 % of 100 has a standard error of 3 %.
    assert held >= 81
    # The law is no quadratic: 0.7 % off.
    assert exact(SIZES).parameters == pytest.approx(BEST, rel=0.07)


def exact(sizes: np.ndarray) -> IsoFlopMinimum:
    """The minimum over runs without noise."""
    return isoflop_minimum(*runs(0, 0.0, sizes), deviation=None, dof=0, confidence=0.9)


def test_an_edge_and_too_few_sizes_are_refused() -> None:
    assert exact(SIZES).interval is None
    with pytest.raises(ValueError, match="least at the smallest size"):
        exact(SIZES * 12)
    with pytest.raises(ValueError, match="least at the largest size"):
        exact(SIZES / 12)
    with pytest.raises(ValueError, match="needs 4 of them; there are 3"):
        exact(SIZES[:3])


def test_noise_that_hides_the_minimum_opens_the_interval() -> None:
    found = isoflop_minimum(*runs(0, 0.0), deviation=0.2, dof=10, confidence=0.95).interval
    assert found is not None and (found.low, found.high) == (0, np.inf)
