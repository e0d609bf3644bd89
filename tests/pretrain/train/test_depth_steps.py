"""What a step's counts come to: thresholds, saved FLOPs, rows of metrics."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.metrics import add_by_router, metric
from pretrain.models.config import ModelConfig
from pretrain.models.router_report import BlockReport, DepthCounts, RouterReport, no_counts, score_histogram
from pretrain.train.depth_steps import (
    DepthRouter,
    router_sums,
    routers,
    row,
    skipped,
    sum_over_ranks,
    thresholds_after,
)
from tests.pretrain.models.random_batch import MOT, depth_tables, tiny_config


def config(**depth: Any) -> ModelConfig:
    table = {
        "schedule": "alternating", "mean_ratio": 0.75, "rule": "threshold", "dense_frac": 0.1,
        "ramp_frac": 0.4, "threshold_momentum": 0.5,
    } | depth  # fmt: skip
    return tiny_config(MOT, num_layers=4, **depth_tables(("image", "speech"), **table))


def report(
    model: ModelConfig, scores: np.ndarray | None = None, visible_pairs: int = 0, **sums: float
) -> RouterReport:
    """The same counts of every router, and as many pairs of every block with routers."""
    numbers = dict.fromkeys(("tokens", "run", "gate", "gate_squared"), 0.0) | sums
    tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in numbers.items()}
    histogram = score_histogram(torch.zeros(0) if scores is None else torch.from_numpy(scores))
    counts = DepthCounts(histogram=histogram, **tensors)
    layers = {
        layer: BlockReport(torch.tensor(visible_pairs), dict.fromkeys(model.depth_ratios(layer), counts))
        for layer in model.whole_blocks
    }
    return no_counts(model) + RouterReport(layers)


def test_every_router_has_a_name() -> None:
    assert routers(config()) == {
        "blocks.1.depth.image": DepthRouter(1, "image", 0.5),
        "blocks.1.depth.speech": DepthRouter(1, "speech", 0.5),
        "blocks.3.depth.image": DepthRouter(3, "image", 0.5),
        "blocks.3.depth.speech": DepthRouter(3, "speech", 0.5),
    }
    assert routers(tiny_config(MOT)) == {}


def _sum() -> RouterReport:
    """Two data-parallel ranks of two tensor-parallel ones; only the last layer reports."""
    w, model = world.start(ParallelConfig(tp=2)), config()
    whole = report(model, np.full(w.dp_rank + 1, 0.5), visible_pairs=3, run=10 + w.dp_rank)
    return sum_over_ranks(RouterReport({3: whole.layers[3]}), model, w)


def test_ranks_sum_their_reports_and_tensor_parallel_ones_count_once() -> None:
    for total in run_on_ranks(_sum, 4):
        assert set(total.layers) == {0, 1, 2, 3}
        assert not total.layers[1].depth["image"].histogram.any()
        for counts in total.layers[3].depth.values():
            assert counts.histogram.sum() == counts.histogram.max() == 3
            assert counts.run == 21 and counts.tokens == 0
        assert total.layers[3].visible_pairs == 6


def test_thresholds_of_the_next_step_follow_its_ratio() -> None:
    model, uniform = config(), np.linspace(0.0, 1.0, 10_001, dtype=np.float32)

    def after(step: int, before: dict[str, float]) -> tuple[float | None, float | None]:
        now = report(model, uniform)
        found = thresholds_after(before, {}, now, model, step=step, num_steps=100)
        return found[0].get("blocks.3.depth.image"), found[1].get("blocks.3.depth.image")

    assert after(5, {}) == (None, None)  # dense: 0.1 of the run
    assert after(30, {}) == pytest.approx((0.25, 0.75), abs=2e-3)  # half of the way from 1 to 0.5
    # It was 0.7625 in the step before, and so much was let through: no average while it moves.
    old = dict.fromkeys(routers(model), 1 - 0.7625)
    assert after(30, old) == pytest.approx((0.25, 0.75), abs=2e-3)
    old = dict.fromkeys(routers(model), 0.1)  # 0.9 let through of 0.5: 0.4 too much, by GAIN 0.15 and 1 - 0.5
    assert after(80, old) == pytest.approx(((0.1 + 0.53) / 2, 0.47), abs=2e-3)
    assert thresholds_after({}, {}, RouterReport(), tiny_config(MOT), step=1, num_steps=9) == ({}, {})


def test_what_was_skipped() -> None:
    model = config()
    found = skipped(model, report(model, tokens=10, run=4, visible_pairs=7), visible_pairs=50)
    assert found is not None
    assert found.tokens == {"image": 12, "speech": 12}
    assert found.pairs == 2 * 50 - 2 * 7  # two layers
    feed_forward = config(parts="feed_forward")
    found = skipped(feed_forward, report(feed_forward, tokens=10, run=4, visible_pairs=7), 50)
    assert found is not None and found.pairs == 0
    assert skipped(tiny_config(MOT), RouterReport(), 50) is None


def test_rows_are_ratios_of_sums() -> None:
    model = config()
    first = router_sums(model, report(model, tokens=10, run=4, gate=10, gate_squared=10.4))
    second = router_sums(model, report(model, tokens=30, run=4, gate=30, gate_squared=31.2))
    found = row(model, add_by_router(first, second))
    assert found["depth/ratio/image"] == found["depth/ratio/image/3"] == 0.2
    assert found["depth/gate_std/speech"] == pytest.approx(math.sqrt(0.04))
    assert all(metric(name) for name in found)
    assert row(model, router_sums(model, report(model))) == {}
    dense = tiny_config(MOT)
    assert router_sums(dense, RouterReport()) == {} and row(dense, {}) == {} == row(model, {})
