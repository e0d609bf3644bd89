"""The harness itself: what it returns, and what a failing, dying or hanging rank looks like."""

import os
import time

import pytest
import torch

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import RanksFailed, run_on_ranks


def _coordinates(base: int) -> tuple[int, int, torch.Tensor]:
    w = world.start(ParallelConfig())
    return w.rank, w.dp_size, torch.tensor(w.sum_over_dp([base + w.rank, 0.5]), dtype=torch.float64)


def _raise_on(rank: int) -> None:
    w = world.start(ParallelConfig())
    if w.rank == rank:
        print("about to fail")
        raise KeyError("on purpose")
    w.barrier()


def _die_on(rank: int) -> None:
    w = world.start(ParallelConfig())
    if w.rank == rank:
        os._exit(3)
    w.barrier()


def _hang_on(rank: int) -> None:
    if int(os.environ["RANK"]) == rank:
        time.sleep(1000)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_results_come_in_rank_order(world_size: int) -> None:
    results = run_on_ranks(_coordinates, world_size, 10)
    total = sum(10 + rank for rank in range(world_size))
    assert [(rank, size) for rank, size, _ in results] == [(rank, world_size) for rank in range(world_size)]
    for _, _, values in results:
        assert values.tolist() == [total, 0.5 * world_size]


def test_an_exception_names_rank_and_shows_traceback_and_output() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)rank 1 of 2.*on purpose.*about to fail") as caught:
        run_on_ranks(_raise_on, 2, 1)
    assert caught.value.rank == 1


def test_a_dead_rank_is_named() -> None:
    with pytest.raises(RanksFailed, match=r"rank 0 of 2.*died without an answer"):
        run_on_ranks(_die_on, 2, 0)


def test_a_hanging_rank_is_killed_and_its_place_shown() -> None:
    with pytest.raises(RanksFailed, match=r"(?s)ranks \[1\] of 2 did not end within 2 s.*_hang_on"):
        run_on_ranks(_hang_on, 2, 1, timeout_s=2.0)


def test_a_local_function_is_refused() -> None:
    with pytest.raises(ValueError, match="top level of a module"):
        run_on_ranks(lambda: None, 2)
