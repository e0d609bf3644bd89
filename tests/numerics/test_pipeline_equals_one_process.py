"""The decoder over pipeline stages, with tensor-parallel and data-parallel ranks: the one process, step for
step. And what is silently wrong otherwise: with the setting flipped, the comparison fails."""

from collections.abc import Callable
from typing import Any

import pytest

from parallel.layout import ParallelConfig
from parallel.pipeline_engine import PipelineEngine
from parallel.zero_engine import ZeroEngine
from tests.numerics.layouts import (
    Towers,
    assert_equals_one_process,
    assert_is_seen,
    assert_within_bf16,
    train_on,
)
from tests.numerics.plain_loop import assert_same

WHOLE_STREAM = {"sequence_parallel": False}


@pytest.mark.parametrize(
    ("ranks", "layout", "towers"),
    [
        (2, {"pp": 2, "zero_stage": 0}, ("dense", "mot", "untied", "weighted", "depth_elements", "vectors")),
        (4, {"pp": 4, "zero_stage": 0}, ("mot",)),
        (4, {"pp": 2, "zero_stage": 0, "activation_checkpointing": True}, ("mot",)),
        (4, {"pp": 2, "tp": 2, "zero_stage": 0}, ("dense", "vectors")),
        (
            4,
            {"pp": 2, "tp": 2, "zero_stage": 0, **WHOLE_STREAM, "activation_checkpointing": True},
            ("mot", "elements"),
        ),
        (4, {"pp": 2}, ("mot",)),
        (8, {"pp": 2, "tp": 2}, ("mot",)),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_stages_equal_one_process(ranks: int, layout: dict[str, Any], towers: tuple[Towers, ...]) -> None:
    """In fp64, but for the two with ZeRO-1."""
    assert_equals_one_process(ranks, layout, towers)


def test_stages_in_bf16_equal_one_process_in_bf16() -> None:
    """Hidden states are bf16 already where they travel, so nothing is rounded anew: 1e-7 measured. After some
    more steps the rounding of one weight falls the other way, and all later steps differ by bf16's error."""
    alone = train_on(1, {}, ("mot",), "bf16")["mot"]
    assert_same(train_on(4, {"pp": 2}, ("mot",), "bf16")["mot"], alone, rtol=1e-5)


def test_bf16_over_tensor_and_pipeline_axes_is_fp32_within_rounding() -> None:
    assert_within_bf16(train_on(4, {"pp": 2, "tp": 2}, ("mot",), "bf16")["mot"])


def _slices_between_stages(engine: ZeroEngine) -> None:
    """DeepSpeed's default: each tensor-parallel rank sends its slice of activations that all are taken to
    have."""
    engine.deepspeed.is_pipe_partitioned = engine.deepspeed.is_grad_partitioned = True


def _other_order_on_a_stage(engine: ZeroEngine) -> None:
    """A stage that takes its micro-batches in another order routes tokens by those of another one."""
    assert isinstance(engine, PipelineEngine)
    if engine.world.pp_rank == 1:
        bring = engine.stage.bring
        engine.stage.bring = lambda micro_batches, scale: bring(micro_batches[::-1], scale)


def _not_divided_by_micro_batches(engine: ZeroEngine) -> None:
    """As if DeepSpeed did not average over micro-batches."""
    assert isinstance(engine, PipelineEngine)
    bring = engine.stage.bring
    engine.stage.bring = lambda micro_batches, scale: bring(micro_batches, scale / 4)


@pytest.mark.parametrize(
    ("tamper", "ranks", "layout"),
    [
        (_slices_between_stages, 4, {"pp": 2, "tp": 2}),
        (_other_order_on_a_stage, 2, {"pp": 2}),
        (_not_divided_by_micro_batches, 2, {"pp": 2}),
    ],
)
def test_a_trap_is_seen(tamper: Callable[[ZeroEngine], None], ranks: int, layout: dict[str, Any]) -> None:
    found = train_on(ranks, layout, ("mot",), "fp32", tamper)["mot"]
    assert_is_seen(found, ParallelConfig(**layout), "mot")
