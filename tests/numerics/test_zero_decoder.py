"""The decoder, dense and with three towers, under ZeRO 0-3 on two ranks: the one process, step for step."""

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from parallel.layout import ParallelConfig
from parallel.zero_engine import ZeroEngine
from tests.numerics.layouts import (
    Towers,
    assert_equals_one_process,
    assert_is_seen,
    dtype_of,
    one_process,
    train_on,
)

Stage = Literal[0, 1, 2, 3]


@pytest.mark.parametrize(
    ("stage", "towers"),
    [
        (0, "mot"),
        pytest.param(1, "dense", marks=pytest.mark.full),
        (1, "mot"),
        (2, "mot"),
        (3, "weighted"),
    ],
)
def test_two_ranks_equal_one_process(stage: Stage, towers: Towers) -> None:
    """In fp64 without ZeRO. Activation checkpointing meets the hooks of ZeRO-3, and one other stage."""
    layout = {"zero_stage": stage, "activation_checkpointing": stage in (1, 3)}
    assert_equals_one_process(2, layout, (towers, "masked") if stage == 0 else (towers,))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_embedding_and_head_of_every_tower(stage: Stage) -> None:
    """And one weight for both, which gets the sum of two gradients."""
    assert_equals_one_process(2, {"zero_stage": stage}, ("untied_elements", "tied_embeddings", "vectors"))


def test_an_absent_tower_has_no_gradient() -> None:
    """The steps that are compared hold a tower that is absent everywhere, and one that a rank misses."""
    steps = one_process("mot", dtype_of(ParallelConfig()))
    first, images_alone, one_rank = (step.grad_norm_by_group["speech"] for step in steps)
    assert first > 0 and images_alone == 0 and one_rank > 0


def _another_loss_scale_on_a_rank(engine: ZeroEngine) -> None:
    backward = engine.deepspeed.backward
    if engine.world.dp_rank == 1:
        engine.deepspeed.backward = lambda loss, **how: backward(1.1 * loss, **how)


def _no_router_gradient_on_a_rank(engine: ZeroEngine) -> None:
    for name, parameter in engine.named_parameters.items():
        if engine.world.dp_rank == 1 and (".router." in name or ".depth." in name):
            parameter.register_hook(torch.zeros_like)


@pytest.mark.parametrize(
    ("tamper", "towers", "stage"),
    [
        (_another_loss_scale_on_a_rank, "mot", 0),
        (_another_loss_scale_on_a_rank, "mot", 1),
        (_no_router_gradient_on_a_rank, "depth_experts", 0),
        (_no_router_gradient_on_a_rank, "depth_experts", 1),
    ],
)
def test_a_fault_of_one_rank_is_seen(
    tamper: Callable[[ZeroEngine], None], towers: Towers, stage: Stage
) -> None:
    layout: dict[str, Any] = {"zero_stage": stage}
    found = train_on(2, layout, (towers,), "fp32", tamper)[towers]
    assert_is_seen(found, ParallelConfig(**layout), towers)
