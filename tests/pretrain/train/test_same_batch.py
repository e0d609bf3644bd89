"""Ranks that share a batch notice when they do not."""

import numpy as np
import pytest

from data_pipeline.stream.batch import Batch
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.train.same_batch import BatchMismatch, require_same_batch
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config


def _batches(seed: int) -> list[Batch]:
    return [random_batch(tiny_config(MOT), seed=seed + number) for number in range(2)]


def _compare(layout: ParallelConfig, odd_rank: int | None, swapped: bool = False) -> bool:
    w = world.start(layout)
    batches = _batches(10 * w.dp_rank)
    if w.rank == odd_rank:
        batches = batches[::-1] if swapped else [*batches[:-1], *_batches(99)[:1]]
    try:
        require_same_batch(batches, step=7, world=w)
    except BatchMismatch as error:
        assert "step 7" in str(error) and f"rank {odd_rank}" in str(error) and "manifest.json" in str(error)
        return True
    return False


@pytest.mark.parametrize("layout", [ParallelConfig(tp=2), ParallelConfig(pp=2)], ids=["tp", "pp"])
def test_a_rank_with_another_batch_is_found_and_other_coordinates_are_not_blamed(
    layout: ParallelConfig,
) -> None:
    assert run_on_ranks(_compare, 4, layout, None) == [False] * 4
    same_coordinate = [2, 3] if layout.tp == 2 else [0, 2]
    odd = same_coordinate[-1]
    found = run_on_ranks(_compare, 4, layout, odd)
    assert [rank for rank, mismatch in enumerate(found) if mismatch] == same_coordinate


def test_the_order_of_micro_batches_counts() -> None:
    assert run_on_ranks(_compare, 2, ParallelConfig(tp=2), 1, True) == [True, True]


def test_data_parallel_ranks_hold_different_batches_by_right() -> None:
    assert run_on_ranks(_compare, 2, ParallelConfig(), 1) == [False, False]


def test_every_array_of_a_batch_counts() -> None:
    (batch, _) = _batches(0)
    for name, value in vars(batch).items():
        if isinstance(value, np.ndarray):
            other = Batch(
                **{
                    **vars(batch),
                    name: np.where(np.arange(value.size).reshape(value.shape) == 5, value + 1, value),
                }
            )
            assert other.digest != batch.digest, name
