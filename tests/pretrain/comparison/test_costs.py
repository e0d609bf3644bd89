"""What arms cost."""

from collections.abc import Callable

import pytest

from pretrain.comparison.costs import step_time_ratio, systems
from pretrain.comparison.findings import Findings


def test_what_arms_cost(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(step_s=lambda arm: 0.12 if arm == "mot" else 0.1)
    cost = systems(f)["mot"]
    assert (cost.step_s, cost.mfu_frac, cost.peak_bytes) == pytest.approx((0.12, 0.31, 9e8))
    assert cost.tokens_per_s == pytest.approx(1024 / 0.121)
    assert cost.flops_per_target == pytest.approx(3e6, rel=1e-5)  # targets are rounded down per modality
    ratio = step_time_ratio(f, "mot")
    assert ratio is not None and ratio.value == pytest.approx(0.121 / 0.101)


def test_step_times_are_compared_by_timing_rounds_alone(make_findings: Callable[..., Findings]) -> None:
    assert step_time_ratio(make_findings(), "mot") is None
