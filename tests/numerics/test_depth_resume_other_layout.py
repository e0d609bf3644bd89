"""A run with depth routing goes on with its thresholds on another layout."""

import math
from pathlib import Path
from typing import Any

import pytest

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.depth_loop import Steps, train_depth
from tests.numerics.layouts import RTOL, Towers, engine_of, model_config
from tests.numerics.plain_loop import assert_same

SAVED_AT, STEPS = 4, 8
Layout = tuple[int, dict[str, Any]]
"""Ranks, and what differs from the standard ParallelConfig."""
ALONE: Layout = (1, {})
PAIRS: dict[str, tuple[Layout, Layout]] = {
    "tp 1 to 2": (ALONE, (2, {"tp": 2})),
    "tp 2 to 1": ((2, {"tp": 2}), ALONE),
    "pp 1 to 2": (ALONE, (2, {"pp": 2})),
    "pp 2 to 1": ((2, {"pp": 2}), ALONE),
    "ZeRO-1 to 3": ((2, {"zero_stage": 1}), (2, {"zero_stage": 3})),
    "ZeRO-3 to tp 2": ((2, {"zero_stage": 3}), (2, {"tp": 2})),
}


def _save(layout: ParallelConfig, towers: Towers, folder: Path) -> tuple[dict[str, float], Steps]:
    """(thresholds that were saved, what an undisturbed run makes of the steps after it)."""
    w = world.start(layout)
    engine, saved = engine_of(w, towers, layout, prefix="decoder."), {}
    with CheckpointWriter(folder, engine, w, keep=1) as writer:

        def save(step: int, chosen_by: tuple[dict[str, float], dict[str, float]]) -> None:
            if step == SAVED_AT:
                saved.update(chosen_by[0])
                writer.save(step, {"thresholds": chosen_by[0], "shares": chosen_by[1]})

        found = train_depth(engine, model_config(towers), w, range(STEPS), num_steps=10, before=save)
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
        engine, model, w, steps, num_steps=10, chosen_by=chosen_by
    )


def on(layout: Layout, fn: Any, *args: Any) -> Any:
    ranks, options = layout
    found = run_on_ranks(fn, ranks, ParallelConfig(**options), *args, timeout_s=180)
    assert all(rank == found[0] for rank in found)
    return found[0]


def assert_goes_on(found: Steps, expected: Steps) -> None:
    assert_same([result for result, _ in found], [result for result, _ in expected], RTOL)
    for (_, thresholds), (_, others) in zip(found, expected, strict=True):
        # A score at the edge of a bin may fall into its neighbour, 1e-4 away.
        assert thresholds == pytest.approx(others, abs=1e-4)


@pytest.mark.parametrize("towers", ["depth", "pmod"])
@pytest.mark.parametrize(("source", "target"), PAIRS.values(), ids=PAIRS)
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
    assert_goes_on(on(ALONE, _go_on, "depth", tmp_path, 0.0)[1], expected)
    with pytest.raises(AssertionError):
        assert_goes_on(on(ALONE, _go_on, "depth", tmp_path, 0.01)[1], expected)
