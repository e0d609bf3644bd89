"""One fit over the cells of a ladder."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from pretrain.comparison.config import make_plan
from pretrain.comparison.ladder_effects import ladder_detectable
from pretrain.comparison.ladder_findings import LadderFindings, find_ladder
from pretrain.comparison.results import RunResult
from pretrain.comparison.run_documents import RunDocuments
from tests.ladders import CASES, rates
from tests.pretrain.comparison.ladder_files import ladder_edit


def test_the_residual_variance_is_that_of_all_cells(turning_ladder: LadderFindings) -> None:
    ladder = turning_ladder
    assert ladder.fit.dof == 5 * 2  # 5 cells of (2 - 1) x (3 - 1)
    assert ladder.fit.num_verdicts == 5 * 3
    residuals = []
    for findings in ladder.cells.values():
        table = np.array([findings.losses[arm, "text"].per_seed for arm in ("dense", "mot")])
        residuals.append(table - table.mean(0) - table.mean(1, keepdims=True) + table.mean())
    variance = (np.array(residuals) ** 2).sum() / 10
    assert ladder.fit.deviation["text"] == pytest.approx(np.sqrt(variance))
    level = 0.05 / 3
    for cell in ladder.cells:
        final = ladder.cells[cell].effects["mot", "text"]
        assert final.estimate == pytest.approx(
            ladder.cells[cell].losses["mot", "text"].mean - ladder.cells[cell].losses["dense", "text"].mean
        )
        assert final.interval is not None
        half = (final.interval.high - final.interval.low) / 2
        # Between the quantile of one contrast and that of Bonferroni over five. No group spreads far.
        one, five = (stats.t.isf(a / 2, 10) * np.sqrt(variance * 2 / 3) for a in (level, level / 5))
        assert one < half < five


def test_documents_of_the_last_evaluation_decide_and_widen_the_intervals(
    turning_ladder: LadderFindings,
) -> None:
    before, generator = turning_ladder, np.random.Generator(np.random.Philox(0))
    targets = {m: np.full(40, 100.0) for m in before.modalities}
    change = {arm: generator.standard_normal(40) for arm in ("dense", "mot")}

    def kept(run: RunResult) -> RunResult:
        final = {m: run.curve(f"eval/loss/{m}").values[-1] for m in targets}
        nats = {m: targets[m] * (final[m] + 0.3 * change[run.arm]) for m in targets}
        documents = RunDocuments(run.planned.num_steps, tuple(map(str, range(40))), targets, nats)
        return replace(run, documents=documents)

    results = [kept(run) for findings in before.cells.values() for run in findings.results]
    after = find_ladder(before.plan, results)
    difference = change["mot"] - change["dense"]
    for cell, findings in after.cells.items():
        assert findings.num_documents == 40
        mine, old = (ladder.cells[cell].effects["mot", "text"] for ladder in (after, before))
        assert mine.estimate == pytest.approx(old.estimate + 0.3 * difference.mean(), abs=1e-9)
        assert mine.interval is not None and old.interval is not None
        halves = [(e.high - e.low) / 2 for e in (mine.interval, old.interval)]
        over = stats.t.isf(0.05 / 3 / 10, 39) * 0.3 * difference.std(ddof=1) / np.sqrt(40)
        assert halves[0] > halves[1] and halves[0] == pytest.approx(over, rel=0.1)
    first = [r if n else replace(r, documents=None) for n, r in enumerate(results)]
    mixed = find_ladder(before.plan, first)
    (without, *others) = mixed.cells.values()
    assert without.num_documents is None and all(f.num_documents == 40 for f in others)


def test_arms_that_read_other_data_take_no_part(make_ladder: Callable[..., LadderFindings]) -> None:
    salted = make_ladder(seed_noise=0.02, fingerprint_salt=lambda arm: arm)
    assert salted.fit.dof == 0 and salted.fit.num_verdicts == 0
    assert all(e.interval is None for f in salted.cells.values() for e in f.effects.values())


def test_what_is_likely_to_be_seen_follows_from_all_cells(comparison_files: Callable[..., Any]) -> None:
    plan = make_plan(comparison_files(edit=ladder_edit()).comparison)
    seen = ladder_detectable(plan)
    # Two arms of three seeds have a standard error of .022 sqrt(2 / 3). With 15 verdicts at 10 degrees of
    # freedom a difference must be some 4.7 of it to be seen with a chance of 80 %.
    assert seen is not None and seen["text"] / (0.022 * np.sqrt(2 / 3)) == pytest.approx(4.7, rel=0.1)
    assert ladder_detectable(make_plan(plan.path, ["comparison.seeds=[1, 2]"])) is None


def test_a_sample_of_synthetic_ladders_is_decided_as_often_as_the_page_says() -> None:
    """docs/results/error_rates.md has a thousand a case: false claims in 3.6 %, effects seen 39.5 %."""
    nothing = rates(CASES["nothing differs, 3 seeds"], 100, seed=1)
    assert nothing.false_claims.value <= 0.11 and nothing.coverage.value == 1 - nothing.false_claims.value
    turns = rates(CASES["the sign turns, 2 % a budget"], 100, seed=1)
    assert turns.power.value == pytest.approx(0.395, abs=0.06) and turns.false_claims.value <= 0.08
