"""The average of weights, against its definition, in plain torch and in engines."""

from typing import Any, Literal

import pytest
import torch

from parallel import world
from parallel.adamw import adamw
from parallel.fragments import PARAMETER, load_fragments
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.weight_average import EMA, with_average
from parallel.zero_engine import ZeroEngine
from tests.numerics.layouts import (
    Towers,
    dtype_of,
    engine_of,
    micro_batches,
    model_config,
    optimizer_of,
    share,
)

DECAY = 0.75
ADAMW = adamw(beta1=0.9, beta2=0.95, eps=1e-8)


def test_it_follows_updates_alone_and_leaves_them_as_they_are() -> None:
    spec = with_average(ADAMW, DECAY)
    assert (spec.name, spec.states) == ("adamw+ema", (*ADAMW.states, EMA))
    assert spec.state_bytes() == ADAMW.state_bytes() + 4
    generator = torch.Generator().manual_seed(1)
    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    group = {"lr": 0.1, "weight_decay": 0.0}
    optimizers = [
        spec_.build([{"params": [w], **group}], None) for spec_, w in zip((spec, ADAMW), weights, strict=True)
    ]
    expected = torch.ones(5, dtype=torch.float64)
    for refused in (True, False, False, True, False):
        gradient = torch.randn(5, generator=generator)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = None if refused else gradient.clone()
            optimizer.step()
        if not refused:
            expected = DECAY * expected + (1 - DECAY) * weights[0].detach().double()
    assert torch.equal(*weights)
    average = optimizers[0].state[weights[0]][EMA]
    assert torch.allclose(average.double(), expected, rtol=1e-6)  # fp32: 1e-7 measured
    state = spec.new_state(weights[0], {})
    assert state.keys() == optimizers[0].state[weights[0]].keys()


def _held(engine: ZeroEngine, kind: str) -> list[torch.Tensor]:
    """This rank's values of a kind, a tensor for each fragment."""
    return [fragment.values[kind].clone() for fragment in engine.fragments()]


def _averages(towers: Towers, layout: ParallelConfig, precision: Literal["fp32", "bf16"]) -> None:
    w, dtype = world.start(layout), dtype_of(layout, precision)
    spec = with_average(optimizer_of(towers), DECAY)
    engine, config = engine_of(w, towers, layout, precision=precision, optimizer=spec), model_config(towers)
    batches = [share(w, micro_batches(config, step, dtype)) for step in range(3)]
    with engine.averaged():  # there is no average before the first update
        before = engine.eval_step(batches[0])[0]
    assert before == engine.eval_step(batches[0])[0]
    expected = _held(engine, PARAMETER)
    for step in range(3):
        engine.train_step(batches[step], step)
        moved = _held(engine, PARAMETER)
        expected = [average.lerp(now, 1 - DECAY) for average, now in zip(expected, moved, strict=True)]
    assert all(map(torch.equal, _held(engine, EMA), expected))
    raw, masters = engine.eval_step(batches[0])[0], _held(engine, PARAMETER)
    with engine.averaged():
        averaged = engine.eval_step(batches[0])[0]
        assert all(map(torch.equal, _held(engine, PARAMETER), expected))
    assert engine.eval_step(batches[0])[0] == raw != averaged
    assert all(map(torch.equal, _held(engine, PARAMETER), masters))
    assert all(map(torch.equal, _held(engine, EMA), expected))

    def fill(fragments: Any) -> None:
        for fragment, values in zip(fragments, expected, strict=True):
            fragment.values[PARAMETER].copy_(values)

    load_fragments(engine.deepspeed, engine.named_parameters, w, spec, engine.counters(), fill)
    assert engine.eval_step(batches[0])[0] == averaged


@pytest.mark.parametrize(
    ("towers", "layout", "precision"),
    [
        ("mot", {"tp": 2, "zero_stage": 0}, "fp32"),
        ("mot", {"zero_stage": 3}, "fp32"),
        ("mot", {"pp": 2, "zero_stage": 1}, "bf16"),
        ("muon", {"zero_stage": 2}, "bf16"),
    ],
    ids=str,
)
def test_engines_keep_it_beside_the_masters_and_evaluate_it(
    towers: Towers, layout: dict[str, Any], precision: str
) -> None:
    run_on_ranks(_averages, 2, towers, ParallelConfig(**layout), precision)
