import csv
import io
import json
from collections.abc import Callable

import pytest

from pretrain.comparison.findings import Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report.files import CURVE_COLUMNS, curves_csv, final_csv, step_matching_csv, summary
from pretrain.comparison.results import load_results


@pytest.fixture
def findings(synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]) -> Findings:
    plan = synthetic_plan()
    write_runs(plan, multiplier=lambda arm, m: 2.0 if (arm, m) == ("mot", "image") else 1.0, noise=0.002)
    return find(plan, load_results(plan))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_summary_is_strict_json_with_the_numbers_of_the_page(findings: Findings) -> None:
    values = json.loads(json.dumps(summary(findings), allow_nan=False))
    image = next(c for c in values["contrasts"] if c["modality"] == "image")
    assert image["winner"] == "mot" and image["difference_nats"] < 0
    assert image["step_matching"]["steps"]["s"]["value"] == pytest.approx(0.5, rel=0.02)
    assert image["interval_nats"][0] < image["difference_nats"] < image["interval_nats"][1]
    assert [c["modality"] for c in values["contrasts"]] == ["text", "image", "speech", "all"]
    assert values["same_data"]["proven"] and values["same_data"]["steps_compared"] == {
        "1": 60,
        "2": 60,
        "3": 60,
    }
    assert values["headlines"]["mot"].startswith("At equal tokens (614 k a run) mot is")
    assert values["systems"]["dense"]["mfu_frac"] == 0.31


def test_what_is_not_known_is_null_and_not_nan(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, multiplier=lambda arm, _: 1e-3 if arm == "mot" else 1.0, until=lambda *_: 40)
    values = json.loads(json.dumps(summary(find(plan, load_results(plan))), allow_nan=False))
    text = values["contrasts"][0]
    assert text["interval_nats"] is None and text["winner"] is None and text["gap_per_doubling_nats"] is None
    assert text["step_matching"]["steps"]["s"] is None


def test_curves_hold_every_value_of_every_run(findings: Findings) -> None:
    lines = rows(curves_csv(findings))
    assert tuple(lines[0]) == CURVE_COLUMNS
    image = [r for r in lines if (r["arm"], r["seed"], r["metric"]) == ("mot", "2", "eval/loss/image")]
    curve = findings.curves("mot", "eval/loss/image")[1]
    assert [float(r["value"]) for r in image] == pytest.approx(
        curve.values.tolist(), rel=1e-9
    )  # 10 digits written
    assert [float(r["train_flops"]) for r in image] == pytest.approx(curve.flops.tolist(), rel=1e-9)


def test_final_losses_per_run(findings: Findings) -> None:
    lines = rows(final_csv(findings))
    value = next(r for r in lines if (r["arm"], r["seed"], r["metric"]) == ("dense", "2", "speech"))
    assert float(value["loss_nats_per_token"]) == pytest.approx(
        findings.losses["dense", "speech"].per_seed[1]
    )
    # per run: three modalities, all targets, a loss and a gain in six directions
    assert len(lines) == 6 * (3 + 1 + 12)


def test_step_matching_points_with_gaps_where_nothing_was_reached(findings: Findings) -> None:
    lines = rows(step_matching_csv(findings))
    assert len(lines) == 4 * 4 * 3 * 30  # contrasts, axes, seeds, evaluations
    image = [r for r in lines if (r["modality"], r["axis"], r["seed"]) == ("image", "steps", "1")]
    assert image[0]["arm_x"] == ""  # mot was below that at its first evaluation
    assert float(image[-1]["arm_x"]) == pytest.approx(300, rel=0.05)  # half of 600; noise on a flat curve
