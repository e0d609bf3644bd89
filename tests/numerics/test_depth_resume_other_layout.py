"""A run with depth routing goes on with its thresholds on another layout."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.stream.batch import Batch
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from pretrain.models.config import ModelConfig
from tests.numerics.choice_margin import LEAST_MARGIN, choice_margin
from tests.numerics.depth_loop import Steps, random_step, train_depth
from tests.numerics.layouts import RTOL, Towers, engine_of, model_config
from tests.numerics.plain_loop import assert_same, deviation

SAVED_AT, STEPS = 2, 4
Layout = tuple[int, dict[str, Any]]
"""Ranks, and what differs from the standard ParallelConfig."""
ALONE: Layout = (1, {})
PAIRS: dict[str, tuple[Layout, Layout, Towers]] = {
    "tp 1 to 2": (ALONE, (2, {"tp": 2}), "depth"),
    "tp 2 to 1": ((2, {"tp": 2}), ALONE, "pmod"),
    "pp 1 to 2": (ALONE, (2, {"pp": 2}), "pmod"),
    "pp 2 to 1": ((2, {"pp": 2}), ALONE, "depth"),
    "ZeRO-1 to 3": ((2, {"zero_stage": 1}), (2, {"zero_stage": 3}), "depth"),
    "ZeRO-3 to tp 2": ((2, {"zero_stage": 3}), (2, {"tp": 2}), "pmod"),
}
"""The layout that saves, the one that goes on, and the model: either rule meets either direction once."""


SEED = 1000
"""Of the batches. With it no choice is so close that rounding turns it."""


def _batches(model: ModelConfig, step: int) -> list[Batch]:
    return random_step(model, step, seed=SEED)


def _margin(layout: ParallelConfig, towers: Towers) -> float:
    """The least margin of a choice in the steps of these tests."""
    w = world.start(layout)
    engine, model = engine_of(w, towers, layout), model_config(towers)
    with choice_margin(engine.module) as margin:
        train_depth(engine, model, w, range(STEPS), _batches, num_steps=10)
    return margin.least


def _save(layout: ParallelConfig, towers: Towers, folder: Path) -> tuple[dict[str, float], Steps]:
    """(thresholds that were saved, what an undisturbed run makes of the steps after it)."""
    w = world.start(layout)
    engine, saved = engine_of(w, towers, layout, prefix="decoder."), {}
    with CheckpointWriter(folder, engine, w, keep=1) as writer:

        def save(step: int, chosen_by: tuple[dict[str, float], dict[str, float]]) -> None:
            if step == SAVED_AT:
                saved.update(chosen_by[0])
                writer.save(step, {"thresholds": chosen_by[0], "shares": chosen_by[1]})

        model, steps = model_config(towers), range(STEPS)
        found = train_depth(engine, model, w, steps, _batches, num_steps=10, before=save)
    return saved, found[SAVED_AT:]


def _go_on(
    layout: ParallelConfig, towers: Towers, folder: Path, moved_by: float
) -> tuple[dict[str, float], Steps]:
    """The same of a run from the checkpoint. `moved_by`: what its thresholds are moved by, for a negative
    control."""
    w = world.start(layout)
    engine = engine_of(w, towers, layout, prefix="decoder.")
    restored = restore(folder, engine, w)
    assert restored is not None and restored.step == SAVED_AT
    thresholds = {name: value + moved_by for name, value in restored.state["thresholds"].items()}
    steps, model = range(SAVED_AT, STEPS), model_config(towers)
    chosen_by = (thresholds, restored.state["shares"])
    return restored.state["thresholds"], train_depth(
        engine, model, w, steps, _batches, num_steps=10, chosen_by=chosen_by
    )


def on(layout: Layout, fn: Any, *args: Any) -> Any:
    ranks, options = layout
    found = run_on_ranks(fn, ranks, ParallelConfig(**options), *args, timeout_s=180)
    assert all(rank == found[0] for rank in found)
    return found[0]


def assert_goes_on(found: Steps, expected: Steps) -> None:
    assert_same([result for result, _ in found], [result for result, _ in expected], RTOL[torch.float32])
    for (_, thresholds), (_, others) in zip(found, expected, strict=True):
        # A score at the edge of a bin may fall into its neighbour, 1e-4 away.
        assert thresholds == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("towers", ["depth", "pmod"])
def test_no_choice_is_so_close_that_rounding_may_turn_it(towers: Towers) -> None:
    assert on(ALONE, _margin, towers) > LEAST_MARGIN


@pytest.mark.parametrize(("source", "target", "towers"), PAIRS.values(), ids=PAIRS)
def test_thresholds_go_on_on_another_layout(
    source: Layout, target: Layout, towers: Towers, tmp_path: Path
) -> None:
    saved, expected = on(source, _save, towers, tmp_path)
    assert saved and all(map(math.isfinite, saved.values()))
    restored, found = on(target, _go_on, towers, tmp_path, 0.0)
    assert restored == saved
    assert_goes_on(found, expected)


def test_without_the_right_thresholds_it_would_be_seen(tmp_path: Path) -> None:
    _, expected = on(ALONE, _save, "depth", tmp_path)
    found = on(ALONE, _go_on, "depth", tmp_path, 0.01)[1]
    moved = deviation([result for result, _ in found], [result for result, _ in expected])
    assert moved > 100 * RTOL[torch.float32]
