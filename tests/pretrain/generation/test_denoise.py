"""Samplers against the steps of their papers, and on one dimension, where the answer is known."""

from statistics import NormalDist

import numpy as np
import pytest

from pretrain.generation.denoise import SAMPLERS, Sampler, denoise, denoising
from pretrain.models.noising import Levels, Objective, Prediction, levels, signal_shares, target

CASES: list[tuple[Objective, Prediction, Sampler, float]] = [
    ("diffusion", "epsilon", "ddpm", 1.0), ("diffusion", "v", "ddpm", 1.0),
    ("diffusion", "epsilon", "ddim", 1.0), ("diffusion", "v", "ddim", 1.0),
    ("flow", "velocity", "euler", 1.0), ("flow", "velocity", "euler", 3.0),
]  # fmt: skip
SHARE, MEANS, DEVIATIONS = 0.3, (-2.0, 1.0), (0.3, 0.5)
"""The answer in one dimension: a mixture of two normal distributions, of which the first has this share."""


def expected_clean(x: np.ndarray, at: Levels) -> np.ndarray:
    """The mean of the mixture given x at these levels: the best that any decoder can predict."""
    first, second = ((at.signal * deviation) ** 2 + at.noise**2 for deviation in DEVIATIONS)
    off = [x - at.signal * mean for mean in MEANS]
    odds = 0.5 * (off[0] ** 2 / first - off[1] ** 2 / second) + 0.5 * np.log(first / second)
    of_first = 1 / (1 + (1 - SHARE) / SHARE * np.exp(np.minimum(odds, 700)))
    means = [
        mean + at.signal * deviation**2 / variance * of
        for mean, deviation, variance, of in zip(MEANS, DEVIATIONS, (first, second), off, strict=True)
    ]
    return of_first * means[0] + (1 - of_first) * means[1]


@pytest.mark.parametrize(("objective", "prediction", "sampler", "shift"), CASES)
def test_samples_have_the_mean_and_the_variance_of_the_data(
    objective: Objective, prediction: Prediction, sampler: Sampler, shift: float
) -> None:
    """Within 2 %, in 250 steps: the error of so many steps halves with twice as many. Measured without fresh
    noise, where 4,000 quantiles stand for all noise: a mean that is off by 0.07 % of the deviation, and a
    variance by 0.7 %. DDPM: 0.3 % and 1.4 %, where 60,000 samples add a standard error of 0.4 % of their own
    (of 200,000 samples the variance was off by 0.9 %)."""
    count = 60_000 if sampler == "ddpm" else 4_000
    start = np.array([NormalDist().inv_cdf((i + 0.5) / count) for i in range(count)])
    generator = np.random.Generator(np.random.Philox(1))
    how = denoising(objective, prediction, sampler=sampler, shift=shift)
    assert len(how.times) == 250

    def predict(x: np.ndarray, time: float) -> np.ndarray:
        at = levels(objective, time)
        clean, of = expected_clean(x, at), target(prediction, at)
        return of.of_eps * (x - at.signal * clean) / at.noise + of.of_clean * clean

    found = denoise(how, predict, start, lambda: generator.standard_normal(count))
    shares = np.array([SHARE, 1 - SHARE])
    mean = float(shares @ MEANS)
    variance = float(shares @ (np.square(MEANS) + np.square(DEVIATIONS))) - mean**2
    assert found.mean() == pytest.approx(mean, abs=0.02 * variance**0.5)
    assert found.var() == pytest.approx(variance, rel=0.02)
    assert (found < -0.5).mean() == pytest.approx(SHARE, rel=0.02)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_a_step_of_ddpm_is_its_posterior(prediction: Prediction) -> None:
    """Equations 6 and 7 of Ho et al. 2020, step by step of all 1,000; the last one returns the mean."""
    how = denoising("diffusion", prediction, steps=1000)
    shares = signal_shares()
    generator = np.random.Generator(np.random.Philox(2))
    noise = iter(generator.standard_normal((1000, 5)))
    seen: list[tuple[float, np.ndarray, np.ndarray]] = []

    def predict(x: np.ndarray, time: float) -> np.ndarray:
        at, clean = levels("diffusion", time), np.linspace(-1, 1, 5)
        of, eps = target(prediction, at), (x - at.signal * clean) / at.noise
        seen.append((time, x, clean))
        return of.of_eps * eps + of.of_clean * clean

    drawn: list[np.ndarray] = []

    def fresh() -> np.ndarray:
        drawn.append(next(noise))
        return drawn[-1]

    final = denoise(how, predict, generator.standard_normal(5), fresh)
    after = [x for _, x, _ in seen[1:]] + [final]
    for number, ((time, x, clean), following) in enumerate(zip(seen, after, strict=True)):
        step = 999 - number
        assert int(time * 1000) == step
        before = shares[step - 1] if step else 1.0
        beta = 1 - shares[step] / before
        mean = np.sqrt(before) * beta / (1 - shares[step]) * clean
        mean += np.sqrt(1 - beta) * (1 - before) / (1 - shares[step]) * x
        deviation = np.sqrt((1 - before) / (1 - shares[step]) * beta)
        # Measured: 1e-12, of the differences of shares beside 1.
        np.testing.assert_allclose(following, mean + deviation * drawn[number], atol=1e-11)


def test_a_step_without_fresh_noise_is_ddim_and_eulers() -> None:
    how = denoising("flow", "velocity", steps=4, shift=3.0)
    asked: list[tuple[float, np.ndarray]] = []

    def velocity(x: np.ndarray, time: float) -> np.ndarray:
        asked.append((time, x))
        return np.sin(x) + time

    final = denoise(how, velocity, np.array([0.3, -1.0]), lambda: pytest.fail("no noise is drawn"))
    times = [time for time, _ in asked] + [0.0]
    np.testing.assert_allclose(times, [1, 0.9, 0.75, 0.5, 0], rtol=1e-15)
    for (time, x), following, end in zip(asked, [*(x for _, x in asked[1:]), final], times[1:], strict=True):
        np.testing.assert_allclose(following, x + (end - time) * (np.sin(x) + time), atol=1e-14)
    # Equation 12 of Song et al. 2021 with sigma = 0, from 250 steps to 249.
    shares, eps = signal_shares()[[3, 7]], np.array([0.5])
    found: list[np.ndarray] = []
    ddim = denoising("diffusion", "epsilon", sampler="ddim")
    denoise(ddim, lambda x, time: found.append(x) or eps, np.array([1.0]), lambda: 0)
    clean = (found[-2] - np.sqrt(1 - shares[1]) * eps) / np.sqrt(shares[1])
    np.testing.assert_allclose(
        found[-1], np.sqrt(shares[0]) * clean + np.sqrt(1 - shares[0]) * eps, rtol=1e-12
    )


def test_times_go_from_the_last_step_of_the_schedule_to_its_first() -> None:
    steps = [int(time * 1000) for time in denoising("diffusion", "v").times]
    assert steps == list(range(999, 0, -4))
    assert SAMPLERS == {"diffusion": ("ddpm", "ddim"), "flow": ("euler",)}
    with pytest.raises(AssertionError, match="euler does not go with diffusion"):
        denoising("diffusion", "v", sampler="euler")


def test_predicted_clean_values_are_clipped_to_their_range() -> None:
    """A prediction far outside of it gives the nearest value, and eps that agrees with that."""
    seen: list[np.ndarray] = []
    how = denoising("diffusion", "epsilon", steps=2, sampler="ddim", bounds=(-1.0, 0.5))
    final = denoise(how, lambda x, _: seen.append(x) or -3 * np.sign(x), np.array([2.0, -2.0]), lambda: 0)
    at, following = levels("diffusion", how.times[0]), levels("diffusion", how.times[1])
    clean = np.array([0.5, -1.0])
    eps = (np.array([2.0, -2.0]) - at.signal * clean) / at.noise
    np.testing.assert_allclose(seen[1], following.signal * clean + following.noise * eps, rtol=1e-12)
    assert final.tolist() == clean.tolist()
