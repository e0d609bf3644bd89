"""Levels of noise, targets and draws, against closed forms that are written here a second time."""

import math

import numpy as np
import pytest
import torch

from pretrain.models.noising import (
    DIFFUSION_STEPS,
    Levels,
    Objective,
    Prediction,
    clean_and_eps,
    evaluation_draw,
    levels,
    noised,
    signal_shares,
    target,
    time_at,
    training_draw,
)

KINDS: list[tuple[Objective, Prediction]] = [
    ("diffusion", "epsilon"), ("diffusion", "v"), ("flow", "velocity"),
]  # fmt: skip


def cosine(step: int) -> float:
    """The share of signal behind `step` steps, in Nichol & Dhariwal's equation 17, in Python's numbers."""
    return (
        math.cos((step / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )


def test_the_cosine_schedule_is_its_closed_form_up_to_the_clipped_step() -> None:
    """Products of 999 ratios telescope; the last ratio is clipped, as the curve ends at 0. Measured: 1.6e-15
    relative."""
    found = signal_shares()
    assert len(found) == DIFFUSION_STEPS
    np.testing.assert_allclose(found[:999], [cosine(step + 1) for step in range(999)], rtol=2e-14)
    assert found[999] == pytest.approx(found[998] * 0.001, rel=1e-12)


def test_the_cosine_schedule_has_the_values_of_diffusers() -> None:
    """`alphas_cumprod` of diffusers 0.42.1, DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2"), in
    float32, printed to nine digits, which is off by 1.3e-5 (measured, relative) in the last steps."""
    steps = [0, 1, 250, 500, 750, 998, 999]
    expected = [
        0.999958694,
        0.99991256,
        0.845888019,
        0.492285043,
        0.143178657,
        2.42876627e-06,
        2.42873499e-09,
    ]
    np.testing.assert_allclose(signal_shares()[steps], expected, rtol=1e-4)


def test_a_time_of_diffusion_means_the_step_below_it() -> None:
    at = levels("diffusion", [0.0, 0.00099, 0.001, 0.9999])
    assert at.signal.tolist() == np.sqrt(signal_shares()[[0, 0, 1, 999]]).tolist()
    np.testing.assert_allclose(at.signal**2 + at.noise**2, 1, rtol=1e-15)
    assert levels("flow", 0.25) == (0.75, 0.25)
    with pytest.raises(AssertionError, match="outside"):
        levels("flow", 1.0)


@pytest.mark.parametrize(("objective", "prediction"), KINDS)
@pytest.mark.parametrize("of_torch", [False, True])
def test_a_target_is_what_papers_say_and_gives_clean_and_eps_back(
    objective: Objective, prediction: Prediction, of_torch: bool
) -> None:
    generator = np.random.Generator(np.random.Philox(1))
    clean, eps = generator.standard_normal((2, 50, 3))
    times = np.arange(50) / 50 * 0.9
    at = levels(objective, times)
    at = Levels(at.signal[:, None], at.noise[:, None])
    if of_torch:
        clean, eps, at = torch.from_numpy(clean), torch.from_numpy(eps), Levels(*map(torch.from_numpy, at))
    seen, of = noised(at, clean, eps), target(prediction, at)
    predicted = of.of_eps * eps + of.of_clean * clean
    share = np.array([cosine(int(1000 * time) + 1) for time in times])[:, None]
    step = times[:, None]
    written = {
        "epsilon": lambda: (np.sqrt(share) * clean + np.sqrt(1 - share) * eps, eps),
        "v": lambda: (np.sqrt(share) * clean + np.sqrt(1 - share) * eps,
                      np.sqrt(share) * eps - np.sqrt(1 - share) * clean),
        "velocity": lambda: (clean + step * (eps - clean), eps - clean),
    }  # fmt: skip
    clean, eps, seen, predicted = (np.asarray(each) for each in (clean, eps, seen, predicted))
    for found, expected in zip((seen, predicted), written[prediction](), strict=True):
        np.testing.assert_allclose(found, expected, atol=3e-14)  # Measured: 2e-15.
    back = clean_and_eps(prediction, at, torch.from_numpy(seen) if of_torch else seen,
                         torch.from_numpy(predicted) if of_torch else predicted)  # fmt: skip
    for found, expected in zip(back, (clean, eps), strict=True):
        np.testing.assert_allclose(np.asarray(found), expected, atol=1e-14)  # Measured: 7e-16.


@pytest.mark.parametrize("most", [1.0, 0.5])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_times_have_the_distribution_that_they_are_named_for(shift: float, most: float) -> None:
    """The share of times below t is t of uniform ones, and Phi(logit(t)) of logit-normal ones; a shift s
    puts s t / (1 + (s - 1) t) in the place of t."""
    for quantile in (2.0**-53, 0.1, 0.5, 0.9, 1 - 2.0**-53):
        for distribution in ("uniform", "logit_normal"):
            found = time_at(quantile, distribution, shift, most) / most
            assert 0 <= found < 1
            before = found / (shift - (shift - 1) * found)
            logit = math.log(before / (1 - before)) if 0 < before < 1 else math.inf
            share = before if distribution == "uniform" else 0.5 * math.erfc(-logit / math.sqrt(2))
            assert share == pytest.approx(quantile, rel=1e-9)


def test_a_draw_depends_on_seed_step_sequence_and_position_alone() -> None:
    numbers = {"seed": 1, "step": 2, "sequence": 3, "position": 4}
    quantile, eps = training_draw(**numbers, size=(5, 2))
    assert eps.dtype == np.float32
    assert eps.shape == (5, 2)
    again = training_draw(**numbers, size=(5, 2))
    assert (again[0], again[1].tolist()) == (quantile, eps.tolist())
    for name in numbers:
        other = training_draw(**{**numbers, name: 9}, size=(5, 2))
        assert other[0] != quantile
        assert not np.isin(other[1], eps).any()


def test_draws_are_uniform_and_normal_and_independent() -> None:
    """Means and correlations of 2,000 images within five standard deviations."""
    drawn = [training_draw(1, step, sequence, position, (4, 2))
             for step in range(25) for sequence in range(4) for position in range(20)]  # fmt: skip
    quantiles = np.array([quantile for quantile, _ in drawn])
    eps = np.array([each for _, each in drawn]).reshape(len(drawn), -1).astype(np.float64)
    assert abs(quantiles.mean() - 0.5) < 5 / math.sqrt(12 * len(drawn))
    assert np.abs(np.histogram(quantiles, 10, (0, 1))[0] - 200).max() < 5 * math.sqrt(200 * 0.9)
    columns = np.column_stack([eps, (quantiles - 0.5) * math.sqrt(12)])
    found = columns.T @ columns / len(drawn)
    assert np.abs(found - np.eye(9)).max() < 5 * math.sqrt(2 / len(drawn))


def test_evaluations_have_one_draw_whose_times_are_spread_evenly() -> None:
    """Of 120 images, 30 texts of four, the quantiles lie within 0.0143 (measured) of 120 even ones;
    independent ones would lie within about 0.08 of them."""
    numbers = {"text": 7, "modality": 1, "image": 2}
    _, eps = evaluation_draw(**numbers, size=(3, 2))
    assert evaluation_draw(**numbers, size=(3, 2))[1].tolist() == eps.tolist()
    for other in (
        *(evaluation_draw(**{**numbers, name: 9}, size=(3, 2)) for name in numbers),
        training_draw(0, 0, 7, 2, (3, 2)),
    ):
        assert not np.isin(other[1], eps).any()
    found = sorted(evaluation_draw(text, 1, image, (1, 1))[0] for text in range(30) for image in range(4))
    assert np.abs(np.array(found) - (np.arange(120) + 0.5) / 120).max() < 0.03
