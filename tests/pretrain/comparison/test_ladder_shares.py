"""s between the runs of a ladder, and where the sign of a difference turns."""

import math

import numpy as np
import pytest

from pretrain.comparison.ladder_shares import Curve, equal_loss_share, share_at_equal_loss, turn

X = np.array([1e5, 4e5, 1.6e6])


def curve(speed: float, x: np.ndarray = X) -> Curve:
    """Losses that fall by 0.1 nats as the budget grows e times, of an arm that needs 1 / speed of it."""
    return Curve(x, 5 - 0.1 * np.log(x * speed), np.full(len(x), 3.0))


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0, 2.0, 8.0])
def test_a_share_is_recovered_either_way(speed: float) -> None:
    # Curves are straight over the logarithm of the budget, but not the logarithm of their loss: 5e-4 (worst)
    assert share_at_equal_loss(curve(1.0), curve(speed)) == pytest.approx(1 / speed, rel=5e-3)


def test_beyond_the_budgets_nothing_is_extrapolated() -> None:
    assert share_at_equal_loss(curve(1.0), curve(20.0)) == 0
    assert share_at_equal_loss(curve(1.0), curve(1 / 20)) == math.inf
    found = equal_loss_share(curve(1.0), curve(15.9), deviation=0.02, dof=20, confidence=0.95)
    assert found.interval is not None and found.interval.low == 0 and found.interval.high > 1 / 15.9
    assert equal_loss_share(curve(1.0), curve(2.0), deviation=None, dof=0, confidence=0.95).interval is None


def test_an_interval_holds_the_true_share_as_often_as_it_says() -> None:
    generator = np.random.Generator(np.random.Philox(3))
    held = []
    for _ in range(300):
        deviation, dof = 0.02, 20
        noisy = [
            Curve(c.x, c.loss + deviation / math.sqrt(3) * generator.standard_normal(3), c.runs)
            for c in (curve(1.0), curve(2.0))
        ]
        estimated = deviation * math.sqrt(generator.chisquare(dof) / dof)
        found = equal_loss_share(*noisy, deviation=estimated, dof=dof, confidence=0.95, draws=400).interval
        assert found is not None
        held.append(found.low <= 0.5 <= found.high)
    # 95 % of 300 has a standard error of 1.3 %
    assert 0.91 <= np.mean(held) <= 0.99


def test_a_turn_is_interpolated_and_bracketed_by_what_is_decided() -> None:
    found = turn([1, 10, 100], [0.2, 0.1, -0.1], [1, 0, -1])
    assert found.estimate == pytest.approx(math.sqrt(1000)) and found.arm_leads_after
    assert (found.last_against, found.decided_for) == (1, (100,))
    other = turn([1, 10, 100], [-0.2, -0.1, -0.1], [-1, 0, -1])
    assert other.estimate is None and (other.last_against, other.decided_for) == (None, (1, 100))
    assert other.range == (1, 100)
    back = turn([1, 10, 100, 1000], [0.1, -0.1, 0.2, -0.3], [0, -1, 1, 0])
    assert back.estimate == pytest.approx(10**2.4) and back.decided_for == () and back.last_against == 100
