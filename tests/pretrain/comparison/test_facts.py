"""Facts of synthetic runs: what is read from their last rows, and the intervals of differences."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pretrain.checkpoint.folder import file_digest
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report import page, tables
from pretrain.comparison.report.files import summary
from pretrain.comparison.results import load_results


def add_facts(plan: ComparisonPlan, gain: float) -> None:
    """Put facts into the last row of every run: mot scores higher by `gain`, seeds differ by 0.02."""
    for run in plan.runs:
        folder = run.config.run_dir
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        exact = 0.3 + gain * (run.arm == "mot") + 0.02 * (run.seed - 2)
        for direction in ("text_to_image", "image_to_text"):
            for kind, value in (("exact", exact), ("per_digit", exact + 0.2), ("foreign_exact", 0.01)):
                rows[-1][f"eval/facts/{direction}/{kind}"] = value
            rows[-1][f"eval/facts/{direction}/foreign_per_digit"] = 0.1
        rows[-1]["eval/facts/text_to_image/judge_exact"] = 0.75
        rows[-1]["eval/facts/text_to_image/judge_per_digit"] = 0.9
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = json.loads((folder / "record.json").read_text())
        record["metrics"]["sha256"] = file_digest(folder / "metrics.jsonl")["sha256"]
        (folder / "record.json").write_text(json.dumps(record))


@pytest.fixture
def findings_with(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> Callable[[float], Findings]:
    def make(gain: float) -> Findings:
        plan = synthetic_plan()
        write_runs(plan)
        add_facts(plan, gain)
        return find(plan, load_results(plan))

    return make


@pytest.mark.usefixtures("without_figures")
def test_accuracies_stand_by_arm_beside_chance_and_judge(findings_with: Callable[[float], Findings]) -> None:
    findings = findings_with(0.1)
    by_name = {fact.name: fact for fact in findings.facts}
    assert set(by_name) == {
        f"{direction}/{kind}"
        for direction in ("text_to_image", "image_to_text")
        for kind in ("exact", "per_digit")
    }
    drawn = by_name["text_to_image/exact"]
    np.testing.assert_allclose(drawn.accuracy["dense"], [0.28, 0.3, 0.32])
    assert drawn.judge == 0.75 and by_name["image_to_text/exact"].judge is None
    assert drawn.foreign == {"dense": pytest.approx(0.01), "mot": pytest.approx(0.01)}
    effect = drawn.effects["mot"]
    assert effect.estimate == pytest.approx(0.1) and effect.primary and effect.interval is not None
    # Seeds differ alike in both arms, so the fit leaves nothing to the residual: 1e-9 measured.
    assert abs(effect.interval.high - effect.interval.low) < 1e-6

    table = tables.fact_table(findings)
    assert table is not None and table.columns[:3] == ("dense", "mot", "mot minus dense")
    row = dict(table.rows)["text to image, exact"]
    assert row[:2] == ("0.300 \u00b1 0.020", "0.400 \u00b1 0.020") and row[2].startswith("+0.100")
    assert row[3:] == ("0.010, 0.010", "0.750")
    text = page.page(findings)
    assert "Facts in what is generated" in text and "<td>0.750</td>" in text
    stated = summary(findings)["facts"]
    assert stated[0]["contrasts"][0]["contrast"] == "mot" and len(stated) == 4


def test_losses_are_decided_as_without_facts(
    findings_with: Callable[[float], Findings], make_findings: Callable[..., Findings]
) -> None:
    with_facts = findings_with(0.1)
    assert with_facts.effects == make_findings().effects
    assert tables.fact_table(make_findings()) is None


def test_runs_that_never_score_have_a_difference_and_no_share(
    findings_with: Callable[[float], Findings], tmp_path: Path
) -> None:
    findings = findings_with(0.0)
    plan = findings.plan
    for run in plan.runs:
        path = run.config.run_dir / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows[-1] = {name: 0.0 if "facts" in name else value for name, value in rows[-1].items()}
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        record = json.loads((run.config.run_dir / "record.json").read_text())
        record["metrics"]["sha256"] = file_digest(path)["sha256"]
        (run.config.run_dir / "record.json").write_text(json.dumps(record))
    findings = find(plan, load_results(plan))
    effect = findings.facts[0].effects["mot"]
    assert effect.estimate == 0 and np.isnan(effect.relative)
    table = tables.fact_table(findings)
    assert table is not None and table.rows[0][1][2] == "0.000"
