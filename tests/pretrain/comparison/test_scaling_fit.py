"""A law of loss is found again."""

import numpy as np
import pytest
from scipy import optimize

from pretrain.comparison.scaling_fit import HUBER, Runs, fit_law
from tests.ladders import LAW, law_runs, recovered


def test_a_law_without_noise_is_recovered() -> None:
    runs = law_runs(0)
    exact = Runs(runs.parameters, runs.tokens, LAW.loss(runs.parameters, runs.tokens))
    # Huber's loss of residuals of 1e-9 is flat: 3e-6 (worst)
    assert fit_law(exact, draws=0).law.theta == pytest.approx(LAW.theta, rel=1e-4)


def test_the_minimum_is_one_that_lbfgs_does_not_leave() -> None:
    runs = law_runs(1)
    found = fit_law(runs, draws=0).law.theta

    def objective(theta: np.ndarray) -> float:
        """Written out again: no code of the fit is used."""
        e, a, b, alpha, beta = theta
        terms = np.exp(e), np.exp(a) / runs.parameters**alpha, np.exp(b) / runs.tokens**beta
        size = np.abs(np.log(sum(terms)) - np.log(runs.loss))
        return float(np.where(size <= HUBER, size**2 / 2, HUBER * (size - HUBER / 2)).sum()) / HUBER

    result = optimize.minimize(objective, found, method="L-BFGS-B", options={"ftol": 1e-14})
    assert result.fun == pytest.approx(objective(found), rel=1e-6)
    nudged = optimize.minimize(
        objective, found + 0.05, method="L-BFGS-B", options={"ftol": 1e-14, "gtol": 1e-9}
    )
    assert nudged.fun >= objective(found) * (1 - 1e-6)


def test_intervals_hold_the_numbers_of_the_law() -> None:
    """A small sample of `python -m tests.ladders --fits 200`: of 4 x 5 numbers 90 % are held, so 14 are at
    least (with a chance above 98 %, were they independent)."""
    shares = recovered(4, 100, draws=60)
    assert sum(round(4 * share.value) for share in shares.values()) >= 14


def test_tokens_for_a_loss_are_those_that_give_it() -> None:
    loss = LAW.loss(np.array([5e4]), np.array([2e6])).item()
    assert LAW.tokens_for(loss, 5e4) == pytest.approx(2e6)
    assert LAW.tokens_for(1.5, 5e4) == np.inf


@pytest.mark.parametrize("ratios", [(4,), (4, 16)])
def test_too_few_cells_are_refused(ratios: tuple[int, ...]) -> None:
    runs = law_runs(0, ratios=ratios)
    few = runs.where(runs.parameters < 2e5 if len(ratios) > 1 else runs.parameters < 3e4)
    few = few if len(ratios) == 1 else runs.where(runs.parameters < 6e4)
    with pytest.raises(ValueError, match="needs 3 sizes and 8 cells; there are"):
        fit_law(few, draws=0)
