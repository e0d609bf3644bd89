"""Fragments of live engines: copy 0 is everything once, and writing into them is what the next step sees."""

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import pytest
import torch

from parallel import world
from parallel.fragments import PARAMETER, Fragment
from parallel.zero_engine import ZeroEngine
from tests.numerics.plain_loop import OPTIMIZER
from tests.numerics.test_zero_equals_one_process import Stage, engine_of
from tests.numerics.toy import Toy, toy_groups, toy_step
from tests.one_world import run_cases

Precision = Literal["fp32", "bf16"]
ENGINES: list[tuple[Stage, Precision]] = [
    (0, "fp32"),
    (1, "fp32"),
    (2, "fp32"),
    (3, "fp32"),
    (1, "bf16"),
    (2, "bf16"),
    (3, "bf16"),
]


def _engine(w: world.World, stage: Stage, precision: Precision) -> ZeroEngine:
    module = Toy()
    return engine_of(module, w, stage, precision=precision, groups=toy_groups(module, frozen="image"))


def _step(engine: ZeroEngine, w: world.World, step: int) -> list[float]:
    return engine.train_step(toy_step(step, dp_size=w.dp_size)[w.dp_rank], step).stats


def _held(w: world.World, stage: Stage, precision: Precision) -> tuple[list[Any], list[Any], Any, Any]:
    """(name, start, count, kinds, replica, values) before and after two steps; the counters."""
    engine = _engine(w, stage, precision)

    def look() -> list[Any]:
        return [
            (f.name, f.start, f.count, sorted(f.values), f.replica, f.values[PARAMETER].float().clone())
            for f in engine.fragments()
        ]

    before, steps_before = look(), engine.counters()
    _step(engine, w, 0)
    _step(engine, w, 1)
    return before, look(), steps_before, engine.counters()


SIZES = {1: ENGINES, 2: ENGINES, 4: [ENGINES[0], ENGINES[4], ENGINES[3]]}
"""Ranks -> engines."""


@cache
def _all_held(world_size: int) -> list[list[Any]]:
    """Of each engine, what every rank holds."""
    return run_cases(_held, world_size, SIZES[world_size])


@pytest.mark.parametrize(
    ("stage", "precision", "world_size"), [(*engine, size) for size in SIZES for engine in SIZES[size]]
)
def test_copy_0_is_every_element_once(stage: Stage, precision: Precision, world_size: int) -> None:
    ranks = _all_held(world_size)[SIZES[world_size].index((stage, precision))]
    shapes = {name: parameter.shape for name, parameter in Toy().named_parameters()}
    for moment, kinds in ((0, [PARAMETER]), (1, sorted((PARAMETER, *OPTIMIZER.states)))):
        whole = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
        counts = dict.fromkeys(shapes, 0)
        for rank in ranks:
            for name, start, count, found, replica, values in rank[moment]:
                assert found == ([PARAMETER] if "image" in name else kinds)
                assert count > 0 and len(values) == count
                if replica == 0:
                    whole[name][start : start + count] = values
                    counts[name] += count
        assert counts == {name: shape.numel() for name, shape in shapes.items()}
        if moment == 0:  # what the module was made with
            for name, parameter in Toy().named_parameters():
                expected = parameter.detach()
                if precision == "bf16":  # DeepSpeed makes masters from the cast weights
                    expected = expected.bfloat16().float()
                assert torch.equal(whole[name].view(parameter.shape), expected), name
    assert all(rank[2:] == (None, {"step": 2.0}) for rank in ranks)


def _written(
    w: world.World, stage: Stage, precision: Precision, persistent: int
) -> tuple[list[float], list[float], set[Any]]:
    """Stats of a step before and after another engine's values were written into this one; its settings."""
    engine = _engine(w, stage, precision)
    for step in range(3):
        _step(engine, w, step)
    saved = {f.name: {k: v.clone() for k, v in f.values.items()} for f in engine.fragments()}
    expected = _step(engine, w, 3)

    module = Toy()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)
    groups = toy_groups(module, frozen="image")
    other = engine_of(module, w, stage, precision=precision, groups=groups, persistent_elements=persistent)
    groups_of = other.torch_optimizer.param_groups
    settings = [(g["weight_decay"], g["betas"], g["lr_scale"]) for g in groups_of]

    def fill(fragments: Sequence[Fragment]) -> None:
        assert {f.name for f in fragments} == saved.keys()
        for fragment in fragments:
            assert fragment.values.keys() == saved[fragment.name].keys()
            for kind, value in fragment.values.items():
                value.copy_(saved[fragment.name][kind])

    other.load({"step": 3.0}, fill)
    assert other.counters() == {"step": 3.0}
    steps = [state["step"] for state in other.torch_optimizer.state.values()]
    assert len({id(step) for step in steps}) == len(steps), "each state counts for itself"
    assert settings == [(g["weight_decay"], g["betas"], g["lr_scale"]) for g in groups_of]
    got = _step(other, w, 3)
    assert other.counters() == {"step": 4.0}
    return expected, got, {float(step) for step in steps}


KEPT_WHOLE = 10_000
WRITTEN = [(*engine, 0) for engine in ENGINES] + [(3, "fp32", KEPT_WHOLE), (3, "bf16", KEPT_WHOLE)]
"""Engines, and how many elements of a parameter stage 3 keeps whole."""


@cache
def _all_written() -> list[list[Any]]:
    return run_cases(_written, 2, WRITTEN)


@pytest.mark.parametrize(("stage", "precision", "persistent"), WRITTEN)
def test_what_is_written_into_fragments_is_what_the_next_step_sees(
    stage: Stage, precision: Precision, persistent: int
) -> None:
    for expected, got, steps in _all_written()[WRITTEN.index((stage, precision, persistent))]:
        assert got == expected
        assert steps == {4.0}  # each was stepped once, not once per group


def _back_to_the_start(w: world.World, stage: Stage) -> tuple[Any, list[str], list[float], list[float]]:
    engine = _engine(w, stage, "fp32")
    saved = {f.name: f.values[PARAMETER].clone() for f in engine.fragments()}
    first = _step(engine, w, 0)
    _step(engine, w, 1)

    def fill(fragments: Sequence[Fragment]) -> None:
        for fragment in fragments:
            fragment.values[PARAMETER].copy_(saved[fragment.name])

    engine.load(None, fill)
    kinds = sorted({kind for f in engine.fragments() for kind in f.values})
    return engine.counters(), kinds, first, _step(engine, w, 0)


def test_before_the_first_update_there_are_no_states() -> None:
    for of_stage in run_cases(_back_to_the_start, 2, [(0,), (1,), (3,)]):
        for counters, kinds, first, again in of_stage:
            assert (counters, kinds) == (None, [PARAMETER])
            assert first == again
