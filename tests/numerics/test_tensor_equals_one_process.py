"""The decoder over tensor-parallel ranks, whole stream or sequence parallel, under ZeRO 0-3: the one process,
step for step. And what is silently wrong otherwise: with the setting flipped, the comparison fails."""

from dataclasses import replace
from typing import Any

import pytest

from parallel import towers as tower_layers
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import RanksFailed, run_on_ranks
from pretrain.models import query_key, vectors
from tests.numerics.layouts import (
    TOWERS,
    Towers,
    assert_equals_one_process,
    assert_is_seen,
    assert_within_bf16,
    train,
    train_on,
)


@pytest.mark.pairwise
@pytest.mark.parametrize("towers", TOWERS)
@pytest.mark.parametrize("activation_checkpointing", [False, True])
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_parallel_ranks_equal_one_process(
    ranks: int, sequence_parallel: bool, activation_checkpointing: bool, towers: Towers
) -> None:
    """In fp64."""
    layout = {
        "tp": 2, "zero_stage": 0, "sequence_parallel": sequence_parallel,
        "activation_checkpointing": activation_checkpointing,
    }  # fmt: skip
    assert_equals_one_process(ranks, layout, (towers,))


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_embedding_and_head_of_every_tower(sequence_parallel: bool) -> None:
    """In fp64. The weights are cut by rows, whether embedding and head are two or one."""
    layout = {"tp": 2, "zero_stage": 0, "sequence_parallel": sequence_parallel}
    assert_equals_one_process(2, layout, ("untied", "tied_embeddings", "masked", "vectors"))


@pytest.mark.parametrize(
    ("zero_stage", "sequence_parallel", "towers"),
    [(1, True, "elements"), (2, False, "dense"), (3, False, "mot")],
)
def test_with_zero_in_fp32(zero_stage: int, sequence_parallel: bool, towers: Towers) -> None:
    layout = {"tp": 2, "zero_stage": zero_stage, "sequence_parallel": sequence_parallel}
    assert_equals_one_process(4, layout, (towers,))


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_is_fp32_within_rounding(stage: int) -> None:
    assert_within_bf16(train_on(4, {"tp": 2, "zero_stage": stage}, ("mot",), "bf16")["mot"])


def _with(trap: str, layout: ParallelConfig) -> Any:
    """`train` with one setting wrong."""
    if trap == "no sum of sequence-parallel norms":
        tower_layers.sum_ = lambda x, tp: x
    elif trap == "no sum of adapters":
        vectors.sum_gradient = lambda x, tp: x
        return train(layout, ("vectors",))
    elif trap == "no sum of query and key norms":
        query_key.sum_ = lambda x, tp: x
    elif trap == "weights not marked as tensor-parallel":
        tower_layers.set_tensor_model_parallel_attributes = lambda *args, **kwargs: None
    elif trap == "no mpu":
        start = world.start
        world.start = lambda *args: replace(start(*args), mpu=None)
    return train(layout, ("mot",))


@pytest.mark.parametrize(
    ("trap", "towers"),
    [
        ("no sum of sequence-parallel norms", "mot"),
        ("no sum of query and key norms", "mot"),
        ("no sum of adapters", "vectors"),
    ],
)
def test_a_sum_over_ranks_that_is_left_out_is_seen(trap: str, towers: Towers) -> None:
    """In fp64: what the first trap makes, 3e-3, is only 60 times the tolerance in fp32."""
    layout = ParallelConfig(tp=2, zero_stage=0)
    assert_is_seen(run_on_ranks(_with, 2, trap, layout)[0][towers], layout, towers)


@pytest.mark.parametrize(("trap", "ranks"), [("weights not marked as tensor-parallel", 2), ("no mpu", 4)])
def test_what_zero_is_not_told_is_seen(trap: str, ranks: int) -> None:
    """By what the engine asserts of its norms."""
    with pytest.raises(RanksFailed, match="AssertionError"):
        run_on_ranks(_with, ranks, trap, ParallelConfig(tp=2))
