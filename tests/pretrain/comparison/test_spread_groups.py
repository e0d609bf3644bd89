"""A group of arms that spreads farther has its own variance."""

import numpy as np
import pytest
from scipy import stats

from pretrain.comparison.simultaneous import Design
from pretrain.comparison.spread_groups import group_half_widths

ARMS, SEEDS = 8, 4
DESIGN = Design(
    np.repeat(np.arange(ARMS), SEEDS),
    np.arange(ARMS * SEEDS) // (2 * SEEDS) * SEEDS + np.tile(np.arange(SEEDS), ARMS),
    np.kron(np.eye(ARMS // 2), [-1.0, 1.0]),
)
"""Four cells of two arms and four seeds, with a contrast each."""
GROUPS = ["small"] * 4 + ["large"] * 4


def losses(factor: float) -> np.ndarray:
    """One outcome whose runs in the first group spread `factor` times as far."""
    noise = np.random.Generator(np.random.Philox(1)).standard_normal((1, ARMS * SEEDS))
    return noise * np.where(DESIGN.arm < 4, factor, 1.0)


def test_only_contrasts_of_the_group_that_spreads_farther_are_wider() -> None:
    half = group_half_widths(losses(6.0), DESIGN, GROUPS, 0.01)
    assert (half[0, :2] > 0).all() and (half[0, 2:] == 0).all()
    own = losses(6.0)[0].reshape(ARMS, SEEDS)[:4]
    variance = own.var(axis=1, ddof=1).mean()  # 4 arms x 3 degrees of freedom
    assert half[0, 0] == pytest.approx(stats.t.isf(0.005, 12) * np.sqrt(variance * 2 / SEEDS))


def test_equal_spreads_and_a_single_group_change_nothing() -> None:
    assert not group_half_widths(losses(1.0), DESIGN, GROUPS, 0.01).any()
    assert not group_half_widths(losses(6.0), DESIGN, ["all"] * ARMS, 0.01).any()


def test_a_contrast_between_groups_has_satterthwaites_degrees_of_freedom() -> None:
    table = losses(1.0) * np.where(DESIGN.arm % 2, 9.0, 1.0)
    half = group_half_widths(table, DESIGN, ["dense", "mot"] * 4, 0.01)
    by_arm = table[0].reshape(ARMS, SEEDS).var(axis=1, ddof=1)
    parts = np.array([by_arm[::2].mean(), by_arm[1::2].mean()]) / SEEDS
    dof = parts.sum() ** 2 / (parts**2 / 12).sum()
    assert half[0] == pytest.approx(np.full(4, stats.t.isf(0.005, dof) * np.sqrt(parts.sum())))
