"""Final losses of an arm."""

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.arm_losses import aligned_arm, arm_loss, with_documents
from tests.pretrain.comparison.test_curve_pairs import curve


def test_the_end_the_lowest_point_and_the_rise_after_it() -> None:
    loss = arm_loss(aligned_arm("mot", [curve([1, 2, 3], [4, 2, 3]), curve([1, 2, 3], [4, 2, 2])]))
    assert loss.per_seed == (3, 2) and loss.mean == 2.5 and loss.best == 2 and loss.best_tokens == 20
    assert loss.deviation == pytest.approx(0.5**0.5) and loss.risen_frac == pytest.approx(0.25)
    judged = with_documents(loss, np.array([5.0, 6.0]))
    assert judged.per_seed == (5, 6) and judged.mean == 5.5
    assert judged.best == 2 and judged.risen_frac == pytest.approx(0.25)  # of the curve still


def test_runs_without_a_common_step_are_one_sentence() -> None:
    with pytest.raises(ConfigError, match="mot: its runs were evaluated at no common step"):
        aligned_arm("mot", [curve([1, 3], [4, 2]), curve([2, 4], [4, 2])])
