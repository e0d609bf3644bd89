"""Laws of a ladder's arms, and s by them."""

import math

import numpy as np
import pytest

from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.ladder_laws import ArmLaw, law_share
from pretrain.comparison.scaling_fit import Law, Runs, fit_law
from tests.ladders import LAW, law_runs


def faster(runs: Runs, speed: float) -> ArmLaw:
    """The law of an arm that has the loss of LAW's runs after 1 / speed of their tokens."""
    fit = fit_law(Runs(runs.parameters, runs.tokens / speed, runs.loss), draws=20)
    return ArmLaw(Runs(runs.parameters, runs.tokens, runs.loss), fit, math.nan)


def test_s_is_recovered_and_marked_where_it_is_extrapolated() -> None:
    runs = law_runs(5)
    base, arm = faster(runs, 1.0), faster(law_runs(6), 2.0)
    size = float(np.unique(runs.parameters)[2])
    tokens = sorted(set(runs.tokens[runs.parameters == size]))
    last = law_share(base, arm, Cell("d", "250tpp", size, int(tokens[-1])), 0.9)
    # noise of .7 % in three seeds a cell: 2 % of s
    assert last.value == pytest.approx(0.5, rel=0.1) and not last.extrapolated
    assert last.interval.low < last.value < last.interval.high
    assert law_share(base, arm, Cell("d", "4tpp", size, int(tokens[0])), 0.9).extrapolated
    floor = Law(np.array([math.log(9.0), *LAW.theta[1:]]))
    stuck = ArmLaw(arm.runs, arm.fit.__class__(floor, (floor,) * 20, arm.fit.residuals), math.nan)
    assert law_share(base, stuck, Cell("d", "250tpp", size, int(tokens[-1])), 0.9).value == math.inf


def test_two_sizes_have_no_law_and_the_page_says_so(turning_ladder: LadderFindings) -> None:
    laws = turning_ladder.laws
    assert set(laws) == {(arm, m) for arm in ("dense", "mot") for m in ("text", "image", "speech")}
    assert laws["dense", "text"] == "a law of five numbers needs 3 sizes and 8 cells; there are 2 and 5."
