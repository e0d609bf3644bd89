"""Quantiles of scores over ranks, and how thresholds follow them."""

import numpy as np
import pytest
import torch
from torch import nn

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.models.routing_state import BINS, ScoreCounts, counts_in
from pretrain.train.thresholds import (
    GAIN,
    RouterCounts,
    ShareTarget,
    next_thresholds,
    quantile,
    share_above,
    take_counts,
)


def counted(scores: torch.Tensor, *sums: float) -> RouterCounts:
    counts = ScoreCounts("place")
    counts.add(scores, *sums)
    taken = counts.take().numpy()
    return RouterCounts(taken[:BINS], tuple(taken[BINS:]))


@pytest.mark.parametrize("std", [0.02, 0.1, 3.0])
@pytest.mark.parametrize("share", [0.0, 0.15, 0.5, 0.85])
def test_a_quantile_splits_the_scores_as_asked(std: float, share: float) -> None:
    scores = 0.3 + std * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    below = float((scores < quantile(counted(scores).histogram, share)).float().mean())
    assert below == pytest.approx(share, abs=1e-3)  # 3e-4 measured; numpy's own is exact


def test_scores_beyond_the_range_are_in_the_outer_bins() -> None:
    histogram = counted(torch.tensor([-1e9, 1e9, 0.0])).histogram
    assert histogram[0] == histogram[-1] == histogram[BINS // 2] == 1 and histogram.sum() == 3


def wanted(ratio: float, *, before: float | None = None, momentum: float = 0.9) -> dict[str, ShareTarget]:
    return {"place": ShareTarget(ratio, ratio if before is None else before, momentum)}


@pytest.mark.parametrize("threshold", [-3.0, -0.02, 0.0, 0.1, 0.31, 5.0])
def test_share_above_is_what_a_threshold_lets_through(threshold: float) -> None:
    scores = 0.1 + 0.1 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    found = share_above(counted(scores).histogram, threshold)
    assert found == pytest.approx(float((scores >= threshold).float().mean()), abs=1e-3)  # 2e-4 measured


def test_thresholds_follow_the_quantile() -> None:
    now = {"place": counted(torch.linspace(1, 2, 10_001))}
    first, asked = next_thresholds({}, {}, now, wanted(0.25))
    assert asked == {"place": 0.25}
    assert first["place"] == pytest.approx(1.75, abs=1e-3)
    # Half of them were let through, as many as wanted, of the step before: only the average moves.
    found, asked = next_thresholds({"place": 1.5}, {"place": 0.5}, now, wanted(0.5))
    assert asked["place"] == pytest.approx(0.5, abs=1e-3) and found["place"] == pytest.approx(1.5, abs=1e-3)
    moving, asked = next_thresholds({"place": 1.5}, {"place": 0.5}, now, wanted(0.25, before=0.5))
    assert moving["place"] == pytest.approx(1.75, abs=2e-3)  # while the ratio moves there is no average
    assert asked["place"] == pytest.approx(0.25, abs=1e-3)
    assert next_thresholds({"place": 0.5}, {}, now, wanted(1.0)) == ({}, {})
    nothing = {"place": counted(torch.zeros(0))}
    assert next_thresholds({"place": 0.5}, {"place": 0.2}, nothing, wanted(0.25)) == (
        {"place": 0.5}, {"place": 0.2},
    )  # fmt: skip
    assert next_thresholds({}, {}, nothing, wanted(0.25)) == ({}, {})


def test_an_excess_is_paid_back() -> None:
    now = {"place": counted(torch.linspace(1, 2, 10_001))}
    found, asked = next_thresholds({"place": 1.0}, {"place": 0.25}, now, wanted(0.25, momentum=0.0))
    assert asked["place"] == pytest.approx(0.25 - GAIN * 0.75, abs=1e-3)  # all were let through
    assert found["place"] == pytest.approx(2 - asked["place"], abs=1e-3)
    _, asked = next_thresholds({"place": 1.0}, {"place": 0.05}, now, wanted(0.25, momentum=0.0))
    assert asked["place"] == 0.0


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
            through.append(float((scores >= thresholds["place"]).float().mean()))
        now = {"place": counted(scores)}
        thresholds, asked = next_thresholds(thresholds, asked, now, wanted(0.4, momentum=0.4))
    error = abs(sum(through[20:]) / len(through[20:]) - 0.4)
    if largest is None:
        assert error > 0.1
    else:
        assert error < largest


def _take() -> dict[str, RouterCounts]:
    w = world.start(ParallelConfig(tp=2))
    module = nn.Module()
    module.score_counts = (ScoreCounts("b"),)  # type: ignore[assignment]
    for counts in counts_in(module):
        counts.add(torch.full((w.dp_rank + 1,), 0.5), 10.0 + w.dp_rank)
    return take_counts(module, ["a", "b"], w)


def test_ranks_sum_their_counts_and_tensor_parallel_ones_count_once() -> None:
    for found in run_on_ranks(_take, 4):
        assert not found["a"].histogram.any()
        assert found["b"].histogram.sum() == found["b"].histogram.max() == 3
        assert found["b"].sums[0] == 21.0


def test_thresholds_are_fp32_values() -> None:
    now = {"place": counted(torch.randn(50))}
    value = next_thresholds({"place": 0.1}, {}, now, wanted(0.3))[0]["place"]
    assert float(np.float32(value)) == value
