"""Steps in which a modality with routers is missing on one data-parallel rank, or everywhere."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch

from data_pipeline.stream.batch import Batch
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.models.config import ModelConfig
from pretrain.train.depth_steps import routers
from tests.numerics.choice_margin import LEAST_MARGIN, choice_margin
from tests.numerics.depth_loop import Steps, random_step, train_depth
from tests.numerics.layouts import RTOL, Towers, dtype_of, engine_of, model_config
from tests.numerics.plain_loop import assert_same

ALL = ((0, 1, 2),) * 4
PRESENT: Sequence[Sequence[tuple[int, ...]]] = (
    ALL,
    ALL,
    ((0, 2), (0, 2), (0, 1, 2), (0, 1, 2)),  # no image on the first rank
    ((1, 2),) * 4,  # text only as padding
    ((2,),) * 4,  # neither, but for padding
    ((0, 1, 2), (0, 1, 2), (2,), (2,)),  # neither on the second rank
    ALL,
)
"""Of each step. Text and image have routers; two data-parallel ranks take two micro-batches each."""
SEED = {"pmod": 2000}
"""Of the batches, by towers; else 0. With these no choice is so close that rounding turns it."""


def _train(layout: ParallelConfig, towers: Towers) -> tuple[Steps, float]:
    """The steps, and the least margin of a choice where one process makes all of them."""
    w = world.start(layout)
    model, steps, engine = model_config(towers), range(len(PRESENT)), engine_of(w, towers, layout)

    def batches(model: ModelConfig, step: int) -> list[Batch]:
        return random_step(model, step, PRESENT[step], SEED.get(towers, 0))

    with choice_margin(engine.module if w.dp_size == 1 else torch.nn.Identity()) as margin:
        return train_depth(engine, model, w, steps, batches, num_steps=20), margin.least


def train(ranks: int, towers: Towers, **layout: Any) -> tuple[Steps, float]:
    found = run_on_ranks(_train, ranks, ParallelConfig(**layout), towers, timeout_s=180)
    assert all(rank == found[0] for rank in found)
    return found[0]


@pytest.mark.parametrize(("towers", "alone_stage", "zero_stage"), [("depth", 1, 3), ("pmod", 0, 0)])
def test_ranks_that_miss_a_modality_equal_one_process(
    towers: Towers, alone_stage: Literal[0, 1], zero_stage: Literal[0, 3]
) -> None:
    """In fp32 with ZeRO-3, in fp64 without ZeRO."""
    (alone, margin) = train(1, towers, zero_stage=alone_stage)
    (found, _), rtol = (
        train(2, towers, zero_stage=zero_stage),
        RTOL[dtype_of(ParallelConfig(zero_stage=zero_stage))],
    )
    assert margin > LEAST_MARGIN, "a choice of these batches is so close that rounding may turn it"
    assert_same([result for result, _ in found], [result for result, _ in alone], rtol)
    for (_, thresholds), (_, expected) in zip(found, alone, strict=True):
        # Equal here. A score at the edge of a bin may fall into its neighbour, 1e-4 away.
        assert thresholds == pytest.approx(expected, abs=1e-4)
    for name in routers(model_config(towers)):
        after = [thresholds[name] for _, thresholds in found[1:]]  # step 1, 2, ...
        assert (after[2] == after[1]) == name.endswith("text")
        assert after[3] == after[2] and after[4] != after[3]
