"""Groups and small collectives, on real gloo ranks and in one process."""

import pytest
import torch.distributed as dist

from parallel import launch, world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks


def _collectives() -> dict[str, object]:
    w = world.start(ParallelConfig())
    w.barrier()
    found = {
        "coordinates": (
            w.rank,
            w.world_size,
            w.dp_rank,
            w.dp_size,
            w.tp_rank,
            w.tp_size,
            w.pp_rank,
            w.pp_size,
        ),
        # 0.1 has no exact float32: a sum that passed through float32 would show.
        "sum": w.sum_over_dp([0.1, float(w.rank)]),
        "any of one": w.any(w.rank == 1),
        "any of none": w.any(False),
        "broadcast": w.broadcast({"from": w.rank}, source_rank=1),
        "gather": w.gather(f"rank {w.rank}"),
        "mpu": (w.mpu.get_data_parallel_group_ranks(), w.mpu.get_model_parallel_world_size()),
    }
    w.shutdown()
    found["left"] = not dist.is_initialized()
    return found


def test_collectives_on_three_ranks() -> None:
    for rank, found in enumerate(run_on_ranks(_collectives, 3)):
        assert found == {
            "coordinates": (rank, 3, rank, 3, 0, 1, 0, 1),
            "sum": [0.1 + 0.1 + 0.1, 3.0],
            "any of one": True,
            "any of none": False,
            "broadcast": {"from": 1},
            "gather": ["rank 0", "rank 1", "rank 2"],
            "mpu": ([0, 1, 2], 1),
            "left": True,
        }


def _start_twice() -> list[list[float]]:
    sums = []
    for _ in range(2):
        w = world.start(ParallelConfig(), launch.RankFacts(0, 1, 0, "127.0.0.1", 0, None, "single"))
        sums.append(w.sum_over_dp([1.5]))
        w.shutdown()
    return sums


def test_a_world_of_one_starts_without_launcher_and_again_after_shutdown() -> None:
    assert run_on_ranks(_start_twice, 1) == [[[1.5], [1.5]]]


def test_axes_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 processes cannot be laid out as tp = 2 x pp = 1"):
        world.start(ParallelConfig(tp=2), launch.RankFacts(0, 3, 0, "127.0.0.1", 0, None, "single"))
