import numpy as np
import pytest
from scipy.linalg import sqrtm

from pretrain.generation.picture_distance import frechet_distance

RANDOM = np.random.default_rng(1)


def with_moments(mean: np.ndarray, deviations: np.ndarray, count: int) -> np.ndarray:
    """A set whose sample mean and covariance, diag(deviations^2), are exact."""
    white = RANDOM.standard_normal((count, len(mean)))
    white -= white.mean(axis=0)
    white = np.linalg.qr(white)[0] * np.sqrt(count - 1)
    return mean + white * deviations


def test_the_distance_of_normal_distributions_along_axes_is_its_closed_form() -> None:
    """|difference of means|^2 + |difference of deviations|^2; measured: 4e-16 relative."""
    means, deviations = RANDOM.standard_normal((2, 6)), RANDOM.uniform(0.1, 2, (2, 6))
    a, b = (with_moments(m, d, n) for m, d, n in zip(means, deviations, (40, 70), strict=True))
    expected = ((means[0] - means[1]) ** 2).sum() + ((deviations[0] - deviations[1]) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    turn = np.linalg.qr(RANDOM.standard_normal((6, 6)))[0]
    assert frechet_distance(a @ turn, b @ turn) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)


def test_the_distance_is_fids_where_covariances_do_not_commute() -> None:
    """With scipy's square root of A B, which FID's code takes. Sets that are smaller than their features have
    a distance, too."""
    a = RANDOM.standard_normal((50, 5)) @ RANDOM.standard_normal((5, 5))
    b = RANDOM.standard_normal((60, 5)) @ RANDOM.standard_normal((5, 5)) + 1
    first, second = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(
        first + second - 2 * sqrtm(first @ second).real
    )
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)
    few = RANDOM.standard_normal((4, 20))
    assert frechet_distance(few, few + 1) == pytest.approx(20, abs=1e-5)  # a root of rounding: 7e-7 measured
    assert 0 <= frechet_distance(few, few) < 1e-5
