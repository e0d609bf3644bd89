"""Timing rounds: their order, what follows from them, and what is said where there are none."""

import json
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.caveats import caveats
from pretrain.comparison.config import make_plan
from pretrain.comparison.findings import find
from pretrain.comparison.first_runs import first_line
from pretrain.comparison.pending_runs import unfinished
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.plan_file import write_plan
from pretrain.comparison.results import load_results
from pretrain.comparison.statistics import Interval, RatioEstimate
from pretrain.comparison.step_timing import STARTING_STEPS, STEPS, check_timed, over_rounds, timed_lines
from pretrain.comparison.verdict import budget_text, headline, verdict
from tests import timed_ratios

EQUAL_SECONDS = 'match = "seconds"\n'
STEP_S = {"dense": 0.1, "mot": 0.125}
SPELLS = (1.0, 1.0, 2.0, 1.0, 1.1)
"""How many times slower the machine was in a round."""


def write_rounds(plan: ComparisonPlan, odd: Mapping[tuple[str, int], float] = {}) -> None:
    """Write what timing runs leave. The first steps are slow; `odd`: factors by (arm, round)."""
    for run in plan.first:
        assert run.round is not None
        step_s = STEP_S[run.arm] * SPELLS[run.round - 1] * odd.get((run.arm, run.round), 1.0)
        write_timing_run(run, step_s)


def write_timing_run(run: PlannedRun, step_s: float) -> None:
    folder = run.config.run_dir
    folder.mkdir(parents=True)
    rows = [{"step": s, "time/train_s": 5 + s * step_s} for s in (STARTING_STEPS, 20, STEPS)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.resolved.json").write_text(run.config.model_dump_json())
    attempt = {"stopped": "now", "to_step": STEPS, "device": "cpu", "processor": "a processor"}
    attempt["layout"] = {"dp": 1, "tp": 1, "pp": 1}
    (folder / "record.json").write_text(json.dumps({"status": "done", "attempts": [attempt]}))


def equal_seconds(text: str) -> str:
    return EQUAL_SECONDS + text


def test_rounds_take_turns_and_one_that_was_cut_off_is_made_again(
    comparison_files: Callable[..., Any],
) -> None:
    files = comparison_files(edit=equal_seconds)
    plan = make_plan(files.comparison)
    assert [run.name for run in plan.first[:5]] == [
        "dense_round1", "mot_round1", "mot_round2", "dense_round2", "dense_round3",
    ]  # fmt: skip
    assert len(plan.first) == 2 * 5 and {run.num_steps for run in plan.first} == {STEPS}
    assert first_line(plan).startswith("5 timing rounds come first: 10 short runs, one at a time")
    with pytest.raises(ConfigError, match=r"motley submit makes no timing rounds, .* --first-only"):
        check_timed(plan, "motley submit")
    write_rounds(plan)
    shutil.rmtree(plan.first[2].config.run_dir)
    again = make_plan(files.comparison)
    assert [run.name for run in unfinished(again)] == ["mot_round2", "dense_round2"]
    check_timed(make_plan(comparison_files().comparison), "motley submit")


def test_runs_cost_equal_seconds_and_the_report_speaks_of_them(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    files = comparison_files(edit=equal_seconds)
    write_rounds(make_plan(files.comparison), {("mot", 2): 1.01, ("mot", 4): 0.99})
    plan = make_plan(files.comparison)
    assert plan.first == () and plan.timing["", "dense"].median == pytest.approx(0.1)
    dense, mot = (plan.run(arm, 1) for arm in plan.arms)
    assert (dense.num_steps, mot.num_steps) == (600, 480)
    assert dense.step_s == pytest.approx(0.1) and mot.step_s == pytest.approx(0.125, rel=1e-4)
    assert timed_lines(plan)[1] == "Timed mot: 126 ms a step (5 rounds, spread 102 %)"
    write_runs(plan, multiplier=lambda arm, _: 2.0 if arm == "mot" else 1.0, noise=0.003, seed_noise=0.003)
    findings = find(plan, load_results(plan))
    assert headline(findings, "mot").startswith("At equal seconds of training (dense: 614 k tokens) mot is")
    assert "a step of mot takes 1.25 (1.2" in budget_text(findings)
    assert "of the seconds of training that dense took" in verdict(findings, findings.contrasts[0]).compute
    texts = [caveat.text for caveat in caveats(findings)]
    assert any(text.startswith("Equal seconds are not equal data here: mot saw 0.80 times") for text in texts)
    assert findings.axes == ("tokens", "flops", "seconds", "steps")
    ends = [findings.contrast("mot", "text").matching[axis].end for axis in ("seconds", "steps")]
    assert ends[0] is not None and ends[1] is not None
    assert ends[0].value == pytest.approx(1.25 * ends[1].value, rel=1e-4)
    untimed = make_plan(comparison_files().comparison)
    assert untimed.runs[0].step_s is None


def test_steps_that_cannot_be_matched_are_refused(comparison_files: Callable[..., Any]) -> None:
    files = comparison_files(edit=equal_seconds)
    short = ["total_tokens=20_480", "optimizer.schedule.warmup_steps=2"]
    write_rounds(make_plan(files.comparison, short), {("mot", 2): 1.2})
    with pytest.raises(ConfigError, match=r'match = "seconds": arms\."mot" costs 0\.12\d* seconds a step'):
        make_plan(files.comparison, short)


def test_a_timing_run_without_seconds_is_named(comparison_files: Callable[..., Any]) -> None:
    files = comparison_files(edit=equal_seconds)
    write_rounds(plan := make_plan(files.comparison))
    (plan.first[0].config.run_dir / "metrics.jsonl").write_text('{"step": 30}\n')
    with pytest.raises(ConfigError, match=r"dense_round1/metrics\.jsonl: fewer than two rows .* remove"):
        make_plan(files.comparison)


def test_a_share_of_seconds_holds_the_spread_of_the_rounds() -> None:
    seeds = RatioEstimate(0.8, (0.79, 0.8, 0.81), Interval(0.775, 0.825))
    steady, loose = (RatioEstimate(1.0, of, None) for of in ((1.0, 1.0, 1.0), (0.9, 1.0, 1.1)))
    same, wider = (over_rounds(seeds, rounds, 0.95) for rounds in (steady, loose))
    assert same is not None and wider is not None and same.interval is not None and wider.interval is not None
    assert wider.interval.high > same.interval.high and over_rounds(seeds, None, 0.95) is seeds
    name = "5 seeds that differ by 5 %, 5 rounds by 5 %"
    held, alone = timed_ratios.measure(timed_ratios.cases()[name], 400)
    assert held.low <= 0.95 <= held.high and alone.high < 0.9


def test_rounds_of_another_config_time_nothing(comparison_files: Callable[..., Any]) -> None:
    files = comparison_files(edit=equal_seconds)
    write_rounds(make_plan(files.comparison))
    assert not make_plan(files.comparison, ["comparison.seeds=[9, 1]", "total_tokens=1_024_000"]).first
    with pytest.raises(
        ConfigError, match=r"dense_round1 was timed with another config:\n  data.document_mask"
    ):
        make_plan(files.comparison, ["data.document_mask=false"])


@pytest.mark.parametrize("rates", ["", "rates = [5e-4, 1e-3, 2e-3]\n"])
def test_an_arm_that_is_added_changes_no_lengths(
    rates: str, comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    """The rounds of the other arms would be made again, and the runs that are there would be too long."""
    files = comparison_files(edit=lambda text: EQUAL_SECONDS + rates + text)
    write_rounds(make_plan(files.comparison))
    for _ in range(2 if rates else 1):
        write_runs(make_plan(files.comparison))
    more = comparison_files(
        edit=lambda text: EQUAL_SECONDS + rates + text + '\n[arms.third.model]\ntowers = {text = "all"}\n'
    )
    plan = make_plan(more.comparison)
    assert len(plan.first) == 3 * 5
    with pytest.raises(ConfigError, match=r'match = "seconds" gave its runs their lengths .* another name'):
        write_plan(plan)
    assert not make_plan(comparison_files(edit=lambda text: EQUAL_SECONDS + rates + text).comparison).first
