"""What a step's counts come to: thresholds, saved FLOPs, rows of metrics."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.metrics import add, metric
from pretrain.models.config import ModelConfig
from pretrain.models.depth_accounting import SUMS
from pretrain.models.routing_state import BINS, ScoreCounts
from pretrain.train.depth_steps import places, row, skipped, step_sums, thresholds_after
from pretrain.train.thresholds import RouterCounts
from tests.pretrain.models.random_batch import MOT, tiny_config


def config(**depth: Any) -> ModelConfig:
    table = {
        "schedule": "alternating", "mean_ratio": 0.75, "rule": "threshold", "dense_frac": 0.1,
        "ramp_frac": 0.4, "threshold_momentum": 0.5,
    } | depth  # fmt: skip
    return tiny_config(MOT, num_layers=4, depth={"image": table, "speech": table})


def counted(model: ModelConfig, scores: np.ndarray | None = None, **sums: float) -> dict[str, RouterCounts]:
    values = tuple(sums.get(name, 0.0) for name in SUMS)
    return {name: RouterCounts(_histogram(scores), values) for name in places(model)}


def _histogram(scores: np.ndarray | None) -> np.ndarray:
    counts = ScoreCounts("")
    if scores is not None:
        counts.add(torch.from_numpy(scores))
    return counts.take()[:BINS].numpy()


def test_places_are_the_routers() -> None:
    assert places(config()) == {
        "blocks.1.depth.image": (1, "image", 0.5),
        "blocks.1.depth.speech": (1, "speech", 0.5),
        "blocks.3.depth.image": (3, "image", 0.5),
        "blocks.3.depth.speech": (3, "speech", 0.5),
    }
    assert places(tiny_config(MOT)) == {}


def test_thresholds_of_the_next_step_follow_its_ratio() -> None:
    model, uniform = config(), np.linspace(0.0, 1.0, 10_001, dtype=np.float32)

    def after(step: int, before: dict[str, float]) -> tuple[float | None, float | None]:
        now = counted(model, uniform)
        found = thresholds_after(before, {}, now, model, step=step, num_steps=100)
        return found[0].get("blocks.3.depth.image"), found[1].get("blocks.3.depth.image")

    assert after(5, {}) == (None, None)  # dense: 0.1 of the run
    assert after(30, {}) == pytest.approx((0.25, 0.75), abs=2e-3)  # half of the way from 1 to 0.5
    # It was 0.7625 in the step before, and so much was let through: no average while it moves.
    old = dict.fromkeys(places(model), 1 - 0.7625)
    assert after(30, old) == pytest.approx((0.25, 0.75), abs=2e-3)
    old = dict.fromkeys(places(model), 0.1)  # 0.9 let through of 0.5: 0.4 too much, by GAIN 0.15 and 1 - 0.5
    assert after(80, old) == pytest.approx(((0.1 + 0.53) / 2, 0.47), abs=2e-3)
    assert thresholds_after({}, {}, {}, tiny_config(MOT), step=1, num_steps=9) == ({}, {})


def test_what_was_skipped() -> None:
    model = config()
    found = skipped(model, counted(model, tokens=10, run=4, visible_pairs=7), visible_pairs=50)
    assert found is not None
    assert found.tokens == {"image": 12, "speech": 12}
    assert found.pairs == 2 * 50 - 4 * 7  # two layers; here every router has told of 7
    feed_forward = config(parts="feed_forward")
    found = skipped(feed_forward, counted(feed_forward, tokens=10, run=4, visible_pairs=7), 50)
    assert found is not None and found.pairs == 0
    assert skipped(tiny_config(MOT), {}, 50) is None


def test_rows_are_ratios_of_sums() -> None:
    model = config()
    first = step_sums(model, counted(model, tokens=10, run=4, gate=10, gate_squared=10.4))
    second = step_sums(model, counted(model, tokens=30, run=4, gate=30, gate_squared=31.2))
    found = row(add(first, second))
    assert found["depth/ratio/image"] == found["depth/ratio/image/3"] == 0.2
    assert found["depth/gate_std/speech"] == pytest.approx(math.sqrt(0.04))
    assert all(metric(name) for name in found)
    assert row(step_sums(model, counted(model))) == {}
    assert step_sums(model, {}) == {} and row({"steps": 1.0}) == {}
