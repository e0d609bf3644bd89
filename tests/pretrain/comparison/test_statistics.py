"""Known curves must give back what they were made from."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.comparison.statistics import (
    crossings,
    first_reach,
    gap_noise,
    gap_trend,
    match_curves,
    ratio_over_seeds,
    smooth,
    together_from,
    wobble,
)

STEPS = np.arange(50.0, 1501.0, 50.0)


def power_law(x: np.ndarray, multiplier: float = 1.0) -> np.ndarray:
    """Loss of a run that learns `multiplier` times as fast as one with 1."""
    return 1.2 + 4.0 * (np.maximum(x * multiplier, 1.0) / 20.0) ** -0.45


# -------------------------------------------------------------------------------------------------- step
# matching


@given(st.floats(1.0, 4.0))
def test_a_known_multiplier_is_recovered(multiplier: float) -> None:
    match = match_curves(STEPS, power_law(STEPS), STEPS, power_law(STEPS, multiplier))
    # 1 %: the curves are convex and the crossing is read off chords between 30 points (worst: 0.54 %)
    assert match.slope == pytest.approx(1 / multiplier, rel=0.01)
    assert match.end_ratio == pytest.approx(1 / multiplier, rel=0.01)
    assert match.end_reached and match.never_reached == 0


def test_a_slower_arm_is_matched_where_it_can_be_and_flagged_where_not() -> None:
    match = match_curves(STEPS, power_law(STEPS), STEPS, power_law(STEPS, 0.5))
    assert match.slope == pytest.approx(2.0, rel=0.01)
    assert match.end_ratio == pytest.approx(2.0, rel=0.01)  # read the other way round
    assert not match.end_reached
    assert match.never_reached == 15  # what dense had after step 750, half of 1500
    assert np.isnan(match.other_x[-15:]).all()


def test_nothing_is_extrapolated_for_an_arm_that_never_gets_there() -> None:
    stuck = np.full_like(STEPS, 9.0)
    match = match_curves(STEPS, power_law(STEPS), STEPS, stuck)
    assert match.slope is None and match.end_ratio is None and not match.end_reached
    assert match.never_reached == len(STEPS)


def test_matching_against_seconds_holds_the_price_of_a_step() -> None:
    dense_s, mot_s = STEPS * 0.10, STEPS * 0.15
    match = match_curves(dense_s, power_law(STEPS), mot_s, power_law(STEPS, 2.0))
    assert match.slope == pytest.approx(1.5 / 2.0, rel=0.01)


def test_a_loss_below_the_first_evaluation_is_not_matched_to_it() -> None:
    """When the arm got there was not measured: calling it the first evaluation would invent a number."""
    assert math.isnan(first_reach(STEPS, power_law(STEPS), level=100.0))
    assert first_reach(STEPS, power_law(STEPS), level=float(power_law(STEPS)[0])) == 50.0


def test_first_reach_is_the_first_even_if_the_curve_comes_back_up() -> None:
    x, y = np.array([0.0, 1.0, 2.0, 3.0]), np.array([4.0, 2.0, 3.0, 1.0])
    assert first_reach(x, y, 2.5) == 0.75


def test_multiplier_is_recovered_from_noisy_curves() -> None:
    generator = np.random.Generator(np.random.Philox(1))
    slopes = []
    for _ in range(200):
        noisy = [power_law(STEPS, k) + 0.01 * generator.standard_normal(len(STEPS)) for k in (1.0, 1.6)]
        slopes.append(match_curves(STEPS, noisy[0], STEPS, noisy[1]).slope)
    assert np.mean(slopes) == pytest.approx(1 / 1.6, abs=0.005)  # measured .6273; early points lie high
    assert np.std(slopes) < 0.02  # measured .0084


def test_ratios_are_averaged_as_logarithms_and_all_seeds_count() -> None:
    estimate = ratio_over_seeds([0.5, 1.0, 2.0])
    assert estimate is not None and estimate.value == pytest.approx(1.0) and estimate.interval is not None
    assert estimate.interval.low * estimate.interval.high == pytest.approx(1.0)
    assert ratio_over_seeds([0.5, None]) is None  # a seed that could not be matched may not vanish
    assert ratio_over_seeds([0.5, 0.6]).interval is None  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------- final
# differences


# ------------------------------------------------------------------------------------------------------
# crossings


@given(st.floats(0.1, 0.9))
def test_a_crossing_is_found_where_it_is(share: float) -> None:
    base = power_law(STEPS)
    place = STEPS[0] + share * (STEPS[-1] - STEPS[0])
    found = crossings(STEPS, base, base + 1e-3 * (place - STEPS))
    assert len(found) == 1 and found[0].other_leads
    assert found[0].x == pytest.approx(place, rel=1e-6)  # the gap is linear: only rounding is left


def test_curves_on_each_other_do_not_cross_at_every_wobble() -> None:
    generator = np.random.Generator(np.random.Philox(4))
    base, gap = power_law(STEPS), 0.01 * generator.standard_normal(len(STEPS))
    assert len(crossings(STEPS, base, base + gap)) > 5
    assert crossings(STEPS, base, base + gap, noise=3 * wobble(gap)) == ()


def test_wobble_is_the_noise_and_not_the_shape() -> None:
    generator = np.random.Generator(np.random.Philox(5))
    x = np.linspace(0, 1, 400)
    gap = 5 * x**2 + 0.02 * generator.standard_normal(len(x))
    assert wobble(gap) == pytest.approx(0.02, rel=0.2)  # 15 % is the spread of a median of 400
    assert wobble(gap[:4]) == 0.0


def test_leads_that_change_twice_are_two_crossings() -> None:
    gap = np.array([1.0, -1.0, -1.0, 2.0, 2.0])
    x = np.arange(5.0)
    first, second = crossings(x, np.full(5, 3.0), 3.0 + gap)
    assert (first.x, first.other_leads) == (0.5, True)
    assert (second.x, second.other_leads) == (pytest.approx(2 + 1 / 3), False)


def test_touching_zero_is_no_crossing() -> None:
    gap = np.array([1.0, 0.0, 1.0])
    assert crossings(np.arange(3.0), np.zeros(3), gap) == ()


def test_curves_that_meet_and_stay_together_are_told_from_when() -> None:
    x = np.arange(10.0)
    gap = np.where(x < 4, 1.0, 0.01)
    assert together_from(x, gap, noise=0.05) == 4.0
    assert together_from(x, gap[::-1], noise=0.05) is None
    assert together_from(x, np.ones(10), noise=0.05) is None


def test_trend_is_nats_per_doubling() -> None:
    assert gap_trend(STEPS, -0.1 - 0.02 * np.log2(STEPS)) == pytest.approx(-0.02)
    assert math.isnan(gap_trend(STEPS[:2], STEPS[:2]))


def test_gap_noise_is_student_t_per_point_and_nothing_below_three_seeds() -> None:
    gaps = np.array([[0.0, 1.0], [0.2, 1.0], [0.1, 1.0]])
    # t(0.975, 2) = 4.3027 x standard error
    assert gap_noise(gaps) == pytest.approx([4.3027 * 0.1 / math.sqrt(3), 0.0], rel=1e-4)
    assert (gap_noise(gaps[:2]) == 0).all()


def test_smoothing_keeps_straight_lines_and_both_ends() -> None:
    line = np.linspace(3.0, 1.0, 11)
    assert smooth(line, 5) == pytest.approx(line)  # rounding of a cumulated sum
    assert smooth(np.array([0.0, 3.0, 0.0]), 3) == pytest.approx([0.0, 1.0, 0.0])
    with pytest.raises(ValueError, match="odd"):
        smooth(line, 4)
