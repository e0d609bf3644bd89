"""Curves of two arms beside each other."""

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.curve_pairs import gaps_along, mean_curve, pairs_of_curves
from pretrain.comparison.results import Curve


def curve(steps: list[float], values: list[float], tokens_per_step: float = 10.0) -> Curve:
    x = np.array(steps)
    return Curve(x, tokens_per_step * x, 1e3 * x, x / 2, np.array(values))


def test_at_equal_points_a_gap_is_the_difference_to_the_last_bit() -> None:
    generator = np.random.Generator(np.random.Philox(0))
    base, other = (curve(list(range(1, 40)), generator.random(39).tolist()) for _ in range(2))
    tokens, mean, gaps = gaps_along([base], [other], "tokens", "mot")
    assert np.array_equal(gaps[0], other.values - base.values)
    assert np.array_equal(tokens, base.tokens) and np.array_equal(mean, base.values)


def test_between_evaluations_a_loss_is_on_the_straight_line_and_outside_it_is_not_known() -> None:
    base = curve([10, 20, 30, 40], [4, 3, 2, 1])
    other = curve([15, 25, 30], [3, 2, 1])
    tokens, mean, gaps = gaps_along([base], [other], "tokens", "mot")
    assert tokens.tolist() == [200, 300] and mean.tolist() == [3, 2] and gaps.tolist() == [[-0.5, -1.0]]
    with pytest.raises(ConfigError, match="evaluated from 100 to 400 tokens and mot from 500 to 600"):
        gaps_along([base], [curve([50, 60], [1, 1])], "tokens", "mot")


def test_runs_are_paired_by_seed_and_else_their_means_are() -> None:
    curves = {
        ("dense", 1): curve([10, 20], [3, 2]), ("mot", 1): curve([10, 20], [2, 1]),
        ("dense", 2): curve([10, 15, 20], [5, 4, 4]), ("mot", 3): curve([20], [0]),
    }  # fmt: skip
    seeds, base, other = pairs_of_curves(curves, "dense", "mot")
    assert seeds == (1,) and base[0].values.tolist() == [3, 2] and other[0].values.tolist() == [2, 1]
    del curves["mot", 1]
    seeds, base, other = pairs_of_curves(curves, "dense", "mot")
    assert seeds == () and base[0].values.tolist() == [4, 3] and other[0].values.tolist() == [0]
    assert mean_curve([curve([1, 2], [1, 3])]).values.tolist() == [1, 3]
