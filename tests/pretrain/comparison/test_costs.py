"""What arms cost."""

from collections.abc import Callable

import pytest

from pretrain.comparison.costs import step_time_ratio, systems
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import load_results


def test_what_arms_cost(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(step_s=lambda arm: 0.12 if arm == "mot" else 0.1)
    cost = systems(f)["mot"]
    assert (cost.step_s, cost.mfu_frac, cost.peak_bytes) == pytest.approx((0.12, 0.31, 9e8))
    assert cost.tokens_per_s == pytest.approx(1024 / 0.121)
    assert cost.flops_per_target == pytest.approx(3e6, rel=1e-5)  # targets are rounded down per modality
    ratio = step_time_ratio(f, "mot")
    assert ratio is not None and ratio.value == pytest.approx(1.2)


def test_step_times_are_compared_by_seed(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(edit=lambda text: "extra_baseline_seeds = [7]\n" + text)
    write_runs(plan, step_s=lambda arm: 0.12 if arm == "mot" else 0.1)
    found = load_results(plan)
    ratio = step_time_ratio(find(plan, found), "mot")
    assert ratio is not None and len(ratio.per_seed) == 3
    for row in found[0].rows:
        del row["time/step_s"]
    assert step_time_ratio(find(plan, found), "mot") is None
