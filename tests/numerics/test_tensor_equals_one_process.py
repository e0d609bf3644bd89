"""The decoder over tensor-parallel ranks, whole stream or sequence parallel, under ZeRO 0-3: the one process,
step for step. And what is silently wrong otherwise: with the setting flipped, the comparison fails."""

from dataclasses import replace
from typing import Any

import pytest

from parallel import towers as tower_layers
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import RanksFailed, run_on_ranks
from pretrain.models import query_key
from tests.numerics.layouts import assert_equals_one_process, assert_within_bf16, train, train_on


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (2, {"tp": 2, "zero_stage": 0}),
        (2, {"tp": 2}),
        (2, {"tp": 2, "sequence_parallel": False}),
        (2, {"tp": 2, "zero_stage": 3, "activation_checkpointing": True}),
        *((4, {"tp": 2, "zero_stage": stage}) for stage in (0, 1, 2, 3)),
        (4, {"tp": 2, "zero_stage": 3, "sequence_parallel": False}),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_tensor_parallel_ranks_equal_one_process(ranks: int, layout: dict[str, Any]) -> None:
    # Measured, worst layout: 2e-7 on losses, 3e-6 on the norm of a tower. See RTOL.
    assert_equals_one_process(train_on(ranks, layout))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_fp32_within_rounding(stage: int) -> None:
    found = train_on(4, {"tp": 2, "zero_stage": stage}, ("mot",), 4, "bf16")["mot"]
    assert_within_bf16(found)


def _with(trap: str, layout: ParallelConfig) -> Any:
    """`train` with one setting wrong."""
    if trap == "no sum of sequence-parallel norms":
        tower_layers.sum_ = lambda x, tp: x
    elif trap == "no sum of query and key norms":
        query_key.sum_ = lambda x, tp: x
    elif trap == "weights not marked as tensor-parallel":
        tower_layers.set_tensor_model_parallel_attributes = lambda *args, **kwargs: None
    elif trap == "no mpu":
        start = world.start
        world.start = lambda *args: replace(start(*args), mpu=None)
    return train(layout, ("mot",))


@pytest.mark.parametrize(
    ("trap", "ranks"),
    [
        ("no sum of sequence-parallel norms", 2),
        ("no sum of query and key norms", 2),
        ("weights not marked as tensor-parallel", 2),
        ("no mpu", 4),
    ],
)
def test_a_trap_is_seen(trap: str, ranks: int) -> None:
    """By the comparison, or by what the engine asserts of its norms."""
    with pytest.raises((AssertionError, RanksFailed)) as caught:
        assert_equals_one_process(run_on_ranks(_with, ranks, trap, ParallelConfig(tp=2))[0])
    assert not isinstance(caught.value, RanksFailed) or "AssertionError" in str(caught.value), caught.value
