"""`motley compare` without training: what is refused, what is run, what is reported. The real thing is in
tests/e2e."""

import io
import json
import os
from collections.abc import Callable

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.pending_runs import unfinished
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report.digest import digest_line
from pretrain.comparison.run import detectable_line, finished_page, run_comparison
from pretrain.comparison.run_queue import lock_comparison
from tools.cli import main

pytestmark = pytest.mark.usefixtures("without_figures")


def test_report_only_reports_on_what_has_run_and_starts_nothing(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    with pytest.raises(ConfigError, match="nothing has run yet"):
        run_comparison(plan.path, plan.overrides, report_only=True)
    write_runs(plan, multiplier=lambda arm, _: 2.0 if arm == "mot" else 1.0, until=lambda *_: 200)
    out = io.StringIO()
    assert run_comparison(plan.path, plan.overrides, report_only=True, to=out) == 0
    lines = out.getvalue().splitlines()
    assert lines[1] == "dense_vs_mot: 0 of 4 runs finished"
    assert lines[2].startswith(
        "At equal tokens (205 k a run) of an unfinished comparison, so far, mot's held-out"
    )
    assert (
        "  text: mot lower so far: an observation" in out.getvalue() and "  Mind: Interim" in out.getvalue()
    )
    report = plan.directory / "report" / "index.html"
    assert lines[-1] == f"Report: {report}" and report.is_file()
    assert json.loads((report.parent / "summary.json").read_text())["interim"] is True


def test_a_finished_comparison_is_not_run_again(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    assert unfinished(plan) == []
    out = io.StringIO()
    assert run_comparison(plan.path, plan.overrides, to=out) == 0
    assert "A verdict needs 3 seeds of each arm" in out.getvalue()
    assert "; 2 done already" in out.getvalue() and "Report: " in out.getvalue()
    page = plan.directory / "report" / "index.html"
    written = page.stat().st_mtime_ns
    again = io.StringIO()
    assert run_comparison(plan.path, plan.overrides, to=again) == 0
    assert again.getvalue() == out.getvalue() and page.stat().st_mtime_ns == written

    # A verdict that somebody changed is not printed: the report is written anew.
    summary = page.parent / "summary.json"
    good = summary.read_text()
    summary.write_text(good.replace("better", "worse"))
    once_more = io.StringIO()
    assert good != summary.read_text() and run_comparison(plan.path, plan.overrides, to=once_more) == 0
    assert once_more.getvalue() == out.getvalue() and summary.read_text() == good
    summary.write_text(good.replace('"format": 3', '"format": 2'))
    digest = f"{digest_line(summary.read_bytes())}"
    page.write_text(page.read_text().rsplit("<!-- ", 1)[0] + digest)
    assert finished_page(plan) is None, "a report of an earlier version is written anew"
    page.write_text(page.read_text().rsplit("<!-- ", 1)[0] + digest_line(good.encode()))
    summary.write_text(good)
    assert finished_page(plan) == page
    written = page.stat().st_mtime_ns
    metrics = plan.runs[0].config.run_dir / "metrics.jsonl"
    os.utime(metrics, ns=(written + 1, written + 1))
    assert run_comparison(plan.path, plan.overrides, to=again) == 0
    assert page.stat().st_mtime_ns > written, "a run has written since, so the report is written again"


def test_token_folders_that_are_not_there_are_named_before_the_first_run(
    synthetic_plan: Callable[..., ComparisonPlan],
) -> None:
    plan = synthetic_plan(seeds=(1,))
    with pytest.raises(ConfigError, match=r"tokens/train.*no such folder"):
        run_comparison(plan.path, plan.overrides)
    assert not plan.directory.exists()


def test_a_layout_that_cannot_be_is_refused_where_runs_are_started(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    words = (*plan.overrides, "comparison.processes_per_run=3")
    with pytest.raises(ConfigError, match=r'arms."dense", with processes_per_run = 3: .* cannot be split'):
        run_comparison(plan.path, words)
    assert not plan.directory.exists()


def test_how_small_a_difference_may_be_seen_is_told_first(
    synthetic_plan: Callable[..., ComparisonPlan],
) -> None:
    line = detectable_line(synthetic_plan())
    assert line.startswith(
        "Likely to be seen (80 % chance, 3 verdicts jointly at 95 %), in nats per token: text 0.1"
    )
    assert "deviations over seeds" in line
    pilot = synthetic_plan(
        edit=lambda text: "pilot_deviation = {text = 0.01, image = 0.01, speech = 0.01}\n" + text
    )
    assert detectable_line(pilot).endswith("(pilot_deviation)")
    assert detectable_line(synthetic_plan(seeds=(1, 2))).endswith("With fewer this is an observation.")


def test_fewer_than_one_run_at_a_time_is_refused(synthetic_plan: Callable[..., ComparisonPlan]) -> None:
    with pytest.raises(ConfigError, match="--concurrent-runs 0: at least one"):
        run_comparison(synthetic_plan().path, concurrent_runs=0)


def test_a_comparison_that_runs_already_is_not_started_twice(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    with lock_comparison(plan.directory), pytest.raises(ConfigError, match="is running this comparison"):
        run_comparison(plan.path, plan.overrides)


def test_a_mistake_is_one_message_and_exit_code_2(
    synthetic_plan: Callable[..., ComparisonPlan], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = synthetic_plan()
    assert main(["compare", str(plan.path), "model.num_layer=3"]) == 2
    assert 'did you mean "num_layers"' in capsys.readouterr().err
    assert main(["compare", str(plan.path.with_name("nothing.toml"))]) == 2
    assert "nothing.toml: no such file" in capsys.readouterr().err
