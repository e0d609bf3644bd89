"""The fit agrees with textbook tests, and keeps its error rates over synthetic comparisons."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from pretrain.comparison.simultaneous import (
    detectable_effects,
    fit,
    half_widths,
    local_level,
    outcome,
    spread_p,
)
from tests.comparisons import ALPHA, Case, Rates, holm, measure

COUNT = 400


def drawn(case: Case, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.Philox(seed)).standard_normal((3, len(case.runs)))


def test_two_arms_with_the_same_seeds_are_a_paired_t_test() -> None:
    case = Case(2, 5)
    losses = drawn(case)
    fitted = fit(losses, case.design)
    paired = stats.ttest_rel(losses[:, case.design.arm == 1], losses[:, case.design.arm == 0], axis=1)
    assert fitted.dof == 4
    # rounding of inverses: 1e-15 measured
    assert fitted.estimates[:, 0] / fitted.errors[:, 0] == pytest.approx(paired.statistic, rel=1e-12)


def test_a_complete_design_is_a_two_way_analysis_of_variance() -> None:
    case = Case(4, 3, seed_ratio=2.0)
    losses, (arms, seeds) = drawn(case), case.design.indicators
    fitted = fit(losses, case.design)
    model = np.hstack((arms, seeds[:, 1:]))
    coefficients, squares, *_ = np.linalg.lstsq(model, losses.T, rcond=None)
    assert fitted.dof == 12 - 6
    expected = coefficients[1:4] - coefficients[0]
    assert pytest.approx(expected, rel=1e-10) == fitted.estimates.T
    assert fitted.deviation**2 == pytest.approx(squares / 6, rel=1e-10)
    assert fitted.errors == pytest.approx(np.sqrt(2 / 3) * fitted.deviation[:, None].repeat(3, 1), rel=1e-10)


def test_seeds_of_one_arm_alone_count_unless_seeds_matter() -> None:
    """Without an effect of seeds the estimate is that of means; with a large one, that of pairs."""
    case = Case(2, 3, more_baseline_seeds=4)
    design, pure = case.design, drawn(case)
    noise = pure - pure @ np.linalg.pinv(np.hstack(design.indicators)).T @ np.hstack(design.indicators).T
    mean_of_all = noise[:, design.arm == 1].mean(axis=1) - noise[:, design.arm == 0].mean(axis=1)
    assert fit(noise, design).estimates[:, 0] == pytest.approx(mean_of_all)
    shared = noise + 1e3 * np.arange(7)[design.seed]
    paired = [shared[:, (design.arm == a) & (design.seed < 3)].mean(axis=1) for a in (0, 1)]
    # a ratio of variances of 1e6 leaves 1e-6 of the effects of seeds, which are 1e3
    assert fit(shared, design).estimates[:, 0] == pytest.approx(paired[1] - paired[0], abs=1e-2)


def test_runs_that_leave_no_residual_are_refused() -> None:
    case = Case(3, 1)
    assert case.design.dof == 0
    with pytest.raises(ValueError, match="3 runs leave no degree of freedom"):
        fit(drawn(case), case.design)


def test_the_error_of_unequal_spreads_is_welchs() -> None:
    case = Case(2, 6, missing=((1, 4),))
    losses, design = drawn(case), case.design
    fitted = fit(losses, design)
    other, base = losses[:, design.arm == 1], losses[:, design.arm == 0]
    welch = stats.ttest_ind(other, base, axis=1, equal_var=False)
    error = (other.mean(axis=1) - base.mean(axis=1)) / welch.statistic
    assert fitted.welch_errors[:, 0] == pytest.approx(error, rel=1e-10)
    assert fitted.welch_dof[:, 0] == pytest.approx(welch.df, rel=1e-10)
    ratio = other.var(axis=1, ddof=1) / base.var(axis=1, ddof=1)
    assert spread_p(losses, design) == pytest.approx(
        np.stack([stats.f.sf(1 / ratio, 5, 4), stats.f.sf(ratio, 4, 5)], axis=1), rel=1e-9
    )


def test_an_arm_that_spreads_farther_widens_its_own_interval_alone() -> None:
    case = Case(4, 5)
    losses = drawn(case) * np.where(case.design.arm == 1, 30.0, 1.0)
    fitted = fit(losses, case.design)
    assert fitted.spreads_differ.tolist() == [[True, False, False]] * 3
    pooled = stats.t.isf(0.005, fitted.dof) * fitted.errors
    assert (half_widths(fitted, 0.01)[:, 0] > 1.5 * pooled[:, 0]).all()
    assert half_widths(fitted, 0.01)[:, 1:] == pytest.approx(pooled[:, 1:])


def test_the_spread_of_an_arm_of_one_run_is_not_known() -> None:
    case = Case(3, 4, missing=((2, 1), (2, 2), (2, 3)))
    fitted = fit(drawn(case), case.design)
    assert spread_p(drawn(case), case.design)[:, 2].tolist() == [1.0] * 3
    assert np.isfinite(half_widths(fitted, 0.01)).all()


@pytest.mark.parametrize(("arms", "seeds"), [(3, 3), (4, 5), (8, 3)])
def test_the_local_level_is_that_of_the_largest_t(arms: int, seeds: int) -> None:
    design = Case(arms, seeds).design
    level = local_level(design, ALPHA, 3)
    bound = stats.t.isf(level / 2, design.dof)
    correlation = 0.5 * (np.eye(arms - 1) + 1)
    inside = stats.multivariate_t(np.zeros(arms - 1), correlation, df=design.dof, seed=1).cdf(
        np.full(arms - 1, bound), lower_limit=np.full(arms - 1, -bound)
    )
    # 200,000 draws: standard error .0003; measured within .0005
    assert 1 - inside == pytest.approx(ALPHA / 3, abs=0.002)
    assert ALPHA / 3 / (arms - 1) < level < ALPHA / 3


def test_one_contrast_needs_no_draws() -> None:
    assert local_level(Case(2, 5).design, ALPHA, 3) == ALPHA / 3


def test_a_contrast_that_others_imply_costs_less_than_a_free_one() -> None:
    design = Case(3, 5).design
    between = np.vstack((design.weights, [0.0, -1.0, 1.0]))
    three = local_level(replace(design, weights=between), ALPHA, 1)
    assert ALPHA / 3 < three < local_level(design, ALPHA, 1)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (-0.3, -0.1, "lower"),
        (0.1, 0.3, "higher"),
        (-0.049, 0.04, "equivalent"),
        (-0.05, 0.06, "inconclusive"),
        (-0.3, 0.3, "inconclusive"),
        (-0.04, -0.01, "lower"),
    ],
)
def test_three_outcomes_against_a_margin(low: float, high: float, expected: str) -> None:
    assert outcome(low, high, margin=0.05) == expected


def test_the_detectable_effect_is_decided_as_often_as_promised() -> None:
    case = Case(3, 5)
    design, level = case.design, local_level(case.design, ALPHA, 3)
    effect = detectable_effects(design, level)[0]
    generator = np.random.Generator(np.random.Philox(1))
    losses = generator.standard_normal((4000, len(case.runs))) + effect * (design.arm == 1)
    fitted = fit(losses, design)
    decided = np.abs(fitted.estimates[:, 0]) > stats.t.isf(level / 2, fitted.dof) * fitted.errors[:, 0]
    assert decided.mean() == pytest.approx(0.8, abs=5 * math.sqrt(0.16 / 4000))


def at_most(share: float, count: int = COUNT) -> float:
    """A share of `count` trials that trials of chance `share` exceed with a chance of 1e-6."""
    return float(stats.binom.isf(1e-6, count, share)) / count


def at_least(share: float, count: int = COUNT) -> float:
    return 1 - at_most(1 - share, count)


CASES = {
    "2 arms": Case(2, 3),
    "3 arms": Case(3, 5),
    "8 arms": Case(8, 3),
    "12 arms": Case(12, 3),
    "heavy tails": Case(8, 3, heavy=True),
    "a missing run": Case(8, 5, missing=((0, 1),)),
    "a run diverged": Case(8, 3, diverged=((3, 1),)),
    "more seeds of the baseline": Case(8, 3, more_baseline_seeds=3),
    "the same, and seeds matter": Case(2, 3, more_baseline_seeds=5, seed_ratio=1.0),
    "large effects everywhere but one": Case(
        8, 3, effects={(a, m): 0.2 for a in range(1, 8) for m in range(3) if (a, m) != (1, 0)}
    ),
    "one arm spreads farther": Case(8, 5, spread={1: 3.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_false_claims_and_joint_coverage_are_as_promised(name: str) -> None:
    """20,000 comparisons: at most .049 false claims in any of these cases, joint coverage .951 to .964."""
    rates = measure(CASES[name], COUNT)
    assert rates.false_claims.value <= at_most(0.05)
    assert at_least(0.93) <= rates.coverage.value <= at_most(0.97)


def test_two_per_cent_on_text_are_seen_with_eight_arms_and_three_seeds() -> None:
    rates: Rates = measure(Case(8, 3, effects={(1, 0): 0.02}), COUNT)
    assert rates.power.value >= at_least(0.6)  # .61 of 20,000
    assert (
        rates.power.value >= rates.holm_power.value
    )  # the first of 21 tests is stricter than the largest of 21 t


def test_holms_procedure_is_the_known_one() -> None:
    p = np.array([[0.01, 0.04, 0.03, 0.005], [0.06, 0.001, 0.001, 0.001]])
    assert holm(p, 0.05).tolist() == [[True, False, False, True], [False, True, True, True]]
