"""Quantiles of scores, and how thresholds follow them."""

import numpy as np
import pytest
import torch

from pretrain.models.router_report import score_histogram
from pretrain.train.thresholds import (
    GAIN,
    Histogram,
    ShareTarget,
    next_thresholds,
    quantile,
    share_above,
)


def histogram(scores: torch.Tensor) -> Histogram:
    return score_histogram(scores).double().numpy()


@pytest.mark.parametrize("std", [0.02, 0.1, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.85])
def test_a_quantile_splits_the_scores_as_asked(std: float, share: float) -> None:
    scores = 0.3 + std * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    below = float((scores < quantile(histogram(scores), share)).float().mean())
    assert below == pytest.approx(share, abs=1e-3)  # 3e-4 measured; numpy's own is exact


def target(ratio: float, *, before: float | None = None, momentum: float = 0.9) -> dict[str, ShareTarget]:
    return {"router": ShareTarget(ratio, ratio if before is None else before, momentum)}


@pytest.mark.parametrize("threshold", [-3.0, -0.02, 0.0, 0.1, 0.31, 5.0])
def test_share_above_is_what_a_threshold_lets_through(threshold: float) -> None:
    scores = 0.1 + 0.1 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    found = share_above(histogram(scores), threshold)
    assert found == pytest.approx(float((scores >= threshold).float().mean()), abs=1e-3)  # 2e-4 measured


def test_thresholds_follow_the_quantile() -> None:
    now = {"router": histogram(torch.linspace(1, 2, 10_001))}
    first, asked = next_thresholds({}, {}, now, target(0.25))
    assert asked == {"router": 0.25}
    assert first["router"] == pytest.approx(1.75, abs=1e-3)
    # Half of them were let through, as many as wanted, of the step before: only the average moves.
    found, asked = next_thresholds({"router": 1.5}, {"router": 0.5}, now, target(0.5))
    assert asked["router"] == pytest.approx(0.5, abs=1e-3) and found["router"] == pytest.approx(1.5, abs=1e-3)
    moving, asked = next_thresholds({"router": 1.5}, {"router": 0.5}, now, target(0.25, before=0.5))
    assert moving["router"] == pytest.approx(1.75, abs=2e-3)  # while the ratio moves there is no average
    assert asked["router"] == pytest.approx(0.25, abs=1e-3)
    assert next_thresholds({"router": 0.5}, {}, now, target(1.0)) == ({}, {})
    nothing = {"router": histogram(torch.zeros(0))}
    assert next_thresholds({"router": 0.5}, {"router": 0.2}, nothing, target(0.25)) == (
        {"router": 0.5}, {"router": 0.2},
    )  # fmt: skip
    assert next_thresholds({}, {}, nothing, target(0.25)) == ({}, {})


def test_an_excess_is_paid_back() -> None:
    now = {"router": histogram(torch.linspace(1, 2, 10_001))}
    found, asked = next_thresholds({"router": 1.0}, {"router": 0.25}, now, target(0.25, momentum=0.0))
    assert asked["router"] == pytest.approx(0.25 - GAIN * 0.75, abs=1e-3)  # all were let through
    assert found["router"] == pytest.approx(2 - asked["router"], abs=1e-3)
    _, asked = next_thresholds({"router": 1.0}, {"router": 0.05}, now, target(0.25, momentum=0.0))
    assert asked["router"] == 0.0


@pytest.mark.parametrize(("gain", "largest"), [(None, 0.01), (0.0, None)])
def test_drifting_scores_let_the_wanted_share_through(
    gain: float | None, largest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores whose mean moves by a quarter of their deviation in every step, and that are skewed: what is
    let through over 200 steps is within 1 % of the wanted share; by running quantiles alone it is not."""
    if gain is not None:
        monkeypatch.setattr("pretrain.train.thresholds.GAIN", gain)
    generator = torch.Generator().manual_seed(0)
    thresholds, asked, through = {}, {}, []
    for step in range(200):
        scores = 0.1 * torch.randn(500, generator=generator).exp() + 0.025 * step
        if thresholds:
            through.append(float((scores >= thresholds["router"]).float().mean()))
        now = {"router": histogram(scores)}
        thresholds, asked = next_thresholds(thresholds, asked, now, target(0.4, momentum=0.4))
    error = abs(sum(through[20:]) / len(through[20:]) - 0.4)
    if largest is None:
        assert error > 0.1
    else:
        assert error < largest


def test_thresholds_are_fp32_values() -> None:
    now = {"router": histogram(torch.randn(50))}
    value = next_thresholds({"router": 0.1}, {}, now, target(0.3))[0]["router"]
    assert float(np.float32(value)) == value
