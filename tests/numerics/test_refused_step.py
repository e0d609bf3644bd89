"""A step that is refused leaves no trace: what follows is bit for bit what follows without it."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from tests.numerics.layouts import Towers, dtype_of, engine_of, micro_batches, model_config, share

Held = dict[tuple[str, str], torch.Tensor]


def _held(engine: ZeroEngine) -> Held:
    """This rank's parts of parameters and optimizer states."""
    return {
        (fragment.name, kind): values.clone()
        for fragment in engine.fragments()
        for kind, values in fragment.values.items()
    }


def _train(
    w: world.World, towers: Towers, layout: ParallelConfig, precision: str, bad_step: int | None
) -> tuple[Held, dict[str, float] | None, list[StepResult], list[bool]]:
    """Three steps; before step `bad_step` come one that is refused and one that is not finite.

    Returns what is held then, counters, results of the three steps, and which of the refused were applied.
    """
    dtype = dtype_of(layout, precision)
    engine, config = engine_of(w, towers, layout, precision=precision), model_config(towers)
    results, applied = [], []
    asked: list[tuple[Sequence[float], float]] = []

    def refuse(stats: Sequence[float], grad_norm: float) -> bool:
        asked.append((stats, grad_norm))
        return True

    for step in range(3):
        batches = share(w, micro_batches(config, step, dtype))
        if step == bad_step:
            refused = engine.train_step(share(w, micro_batches(config, 7, dtype)), step, refuse)
            assert asked == [(refused.stats, refused.grad_norm)] and math.isfinite(refused.grad_norm)
            broken = [replace(each, loss_weights=each.loss_weights * math.nan) for each in batches]
            not_finite = engine.train_step(broken, step, refuse)
            assert not_finite.grad_norm == math.inf
            applied += [refused.applied, not_finite.applied]
        results.append(engine.train_step(batches, step, lambda *_: False))
    return _held(engine), engine.counters(), results, applied


def _both(towers: Towers, layout: ParallelConfig, precision: str, bad_step: int) -> tuple[bool, list[bool]]:
    w = world.start(layout)
    held, counters, results, applied = _train(w, towers, layout, precision, bad_step)
    expected, expected_counters, expected_results, _ = _train(w, towers, layout, precision, None)
    assert held.keys() == expected.keys()
    same = all(torch.equal(values, expected[key]) for key, values in held.items())
    assert [result.applied for result in results] == [True] * 3
    return same and (counters, results) == (expected_counters, expected_results), applied


@pytest.mark.parametrize(
    ("towers", "layout", "precision", "bad_step"),
    [
        ("mot", {"tp": 2, "zero_stage": 0}, "fp32", 1),
        ("mot", {"zero_stage": 2}, "bf16", 0),
        ("mot", {"zero_stage": 3}, "fp32", 1),
        ("mot", {"pp": 2, "zero_stage": 1}, "bf16", 2),
        ("muon", {"zero_stage": 1}, "fp32", 1),
    ],
    ids=str,
)
def test_a_refused_step_leaves_no_trace(
    towers: Towers, layout: dict[str, Any], precision: str, bad_step: int
) -> None:
    for same, applied in run_on_ranks(_both, 2, towers, ParallelConfig(**layout), precision, bad_step):
        assert same and applied == [False, False]
