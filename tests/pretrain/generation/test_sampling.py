from itertools import product

import numpy as np
import pytest
from scipy.stats import chisquare

from pretrain.generation.sampling import Sampling, draw, probabilities, uniforms

ALL = np.ones(40, bool)


def logits(seed: int = 0, ids: int = 40) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, ids).astype(np.float32)


def naive(scores: np.ndarray, allowed: np.ndarray, how: Sampling) -> np.ndarray:
    """The same by sorting a list of pairs and adding up, one id after the other."""
    ranked = sorted((i for i in range(len(scores)) if allowed[i]), key=lambda i: (-float(scores[i]), i))
    if how.temperature == 0:
        return np.array([float(i == ranked[0]) for i in range(len(scores))])
    ranked = ranked[: how.top_k or None]
    weights = {i: np.exp(float(scores[i]) / how.temperature) for i in ranked}
    total, kept, reached = sum(weights.values()), {}, 0.0
    for i in ranked:
        if reached / total >= how.top_p:
            break
        kept[i], reached = weights[i], reached + weights[i]
    return np.array([kept.get(i, 0.0) / sum(kept.values()) for i in range(len(scores))])


@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 3.0])
def test_probabilities_equal_a_naive_reference(top_k: int | None, top_p: float, temperature: float) -> None:
    how = Sampling(temperature, top_k, top_p)
    allowed = np.random.default_rng(5).random(40) < 0.6
    tied = logits(3)
    tied[[4, 9, 20]] = tied.max()
    for scores, legal in ((logits(1), ALL), (logits(2), allowed), (tied, allowed)):
        found = probabilities(scores, legal, how)
        np.testing.assert_allclose(found, naive(scores, legal, how), rtol=1e-9, atol=1e-12)
        assert not found[~legal].any()


def test_large_logits_stay_finite() -> None:
    assert probabilities(logits() * 1e4, ALL, Sampling(0.1)).max() == 1.0


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.7, top_k=12, top_p=0.95)], ids=str)
def test_frequencies_of_draws_are_the_probabilities(how: Sampling) -> None:
    """10,000 draws of fixed seeds; a correct sampler is refused once in 1,000 seeds."""
    shares, random = probabilities(logits(), ALL, how), uniforms(how.seed, 0, 0)
    drawn = np.bincount([draw(shares, random.random()) for _ in range(10_000)], minlength=40)
    assert not drawn[shares == 0].any()
    likely = shares * 10_000 >= 5  # chi-square needs expected counts of 5; rarer ids are one class
    observed = np.append(drawn[likely], drawn[~likely].sum())
    expected = np.append(shares[likely], shares[~likely].sum()) * 10_000
    used = expected > 0
    assert chisquare(observed[used], expected[used]).pvalue > 1e-3
    wrong = probabilities(logits(), ALL, Sampling(how.temperature * 1.1, how.top_k, how.top_p))[likely]
    wrong = np.append(wrong, 1 - wrong.sum()) * observed.sum()
    assert chisquare(observed[used], wrong[used] * observed.sum() / wrong[used].sum()).pvalue < 1e-3


def test_a_draw_is_never_an_id_of_probability_0() -> None:
    shares = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert [draw(shares, u) for u in (0.0, 0.4999, 0.5, np.nextafter(1.0, 0.0))] == [1, 1, 3, 3]


def test_draws_depend_on_seed_prompt_and_sample_alone() -> None:
    first = [uniforms(7, 3, 2).random() for _ in range(2)]
    assert first[0] == first[1]
    assert len({uniforms(*key).random() for key in product((1, 2), (0, 1), (0, 1))}) == 8
