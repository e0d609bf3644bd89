"""What tensor-parallel ranks exchange, and which rows of the sorted stream each keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel import world
from parallel.collectives import (
    ONE_RANK,
    TensorParallel,
    combine,
    gather_rows,
    of_first_rank,
    own_chunk,
    scatter_sum,
    sum_,
    whole_rows,
)
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks


class _Peers:
    """Stands where the group would: counting rows needs none."""


def axis_of(rank: int, size: int) -> TensorParallel:
    return TensorParallel(rank, size, _Peers(), sequence_parallel=size > 1)  # type: ignore[arg-type]


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4), st.integers(1, 4))
def test_chunks_share_out_every_towers_rows(counts: list[int], size: int) -> None:
    counts[0] += -sum(counts) % size
    stream = [tower for tower, count in enumerate(counts) for _ in range(count)]
    chunk = len(stream) // size
    for rank in range(size):
        kept = axis_of(rank, size).chunk_counts(tuple(counts))
        mine = stream[rank * chunk : (rank + 1) * chunk]
        assert kept == tuple(mine.count(tower) for tower in range(len(counts)))


def test_without_sequence_parallel_every_rank_keeps_all() -> None:
    assert ONE_RANK.chunk_counts((3, 0, 2)) == (3, 0, 2)
    assert TensorParallel(1, 2, _Peers()).chunk_counts((3, 0, 2)) == (3, 0, 2)  # type: ignore[arg-type]


def test_a_stream_that_cannot_be_cut_evenly_is_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError, match="5 tokens"):
        axis_of(0, 2).chunk_counts((3, 2))


def _exchange() -> list[torch.Tensor]:
    tp = world.start(ParallelConfig(tp=2)).tensor_parallel
    mine = torch.arange(4.0).view(4, 1) + 10 * tp.rank
    gathered, handle = gather_rows(mine[:2], tp)
    handle.wait()
    chunk, handle = scatter_sum(mine, tp)
    handle.wait()
    partial = mine.clone().requires_grad_()
    combined = combine(partial, tp)
    (combined * (1 + tp.rank)).sum().backward()
    assert partial.grad is not None
    return [gathered, chunk, combined.detach(), partial.grad, sum_(mine.clone(), tp)]


def test_rows_and_sums_over_two_ranks() -> None:
    for rank, (gathered, chunk, combined, grad, total) in enumerate(run_on_ranks(_exchange, 2)):
        assert gathered.flatten().tolist() == [0, 1, 10, 11]
        assert chunk.flatten().tolist() == [[10, 12], [14, 16]][rank]
        assert combined.flatten().tolist() == chunk.flatten().tolist()
        assert grad.flatten().tolist() == [1, 1, 2, 2]  # of the chunk of each rank, gathered
        assert total.flatten().tolist() == [10, 12, 14, 16]


def _there_and_back() -> list[torch.Tensor]:
    tp = world.start(ParallelConfig(tp=2)).tensor_parallel
    mine = (torch.arange(2.0).view(2, 1) + 10 * tp.rank).requires_grad_()
    whole = whole_rows(mine, tp)
    whole.retain_grad()
    chunk = own_chunk(3 * whole, tp)
    (chunk * torch.tensor([[1.0], [2.0]]) * (1 + tp.rank)).sum().backward()
    assert mine.grad is not None and whole.grad is not None
    return [whole.detach(), chunk.detach(), whole.grad, mine.grad, of_first_rank(mine.detach().clone(), tp)]


def test_the_whole_stream_and_back() -> None:
    for rank, (whole, chunk, whole_grad, grad, first) in enumerate(run_on_ranks(_there_and_back, 2)):
        assert whole.flatten().tolist() == [0, 1, 10, 11]
        assert chunk.flatten().tolist() == [[0, 3], [30, 33]][rank]
        assert whole_grad.flatten().tolist() == [3, 6, 6, 12]  # of all ranks' chunks, on every rank
        assert grad.flatten().tolist() == [[3, 6], [6, 12]][rank]
        assert first.flatten().tolist() == [0, 1]


def test_one_rank_exchanges_nothing() -> None:
    x = torch.ones(2, 1)
    assert combine(x, ONE_RANK) is x and sum_(x, ONE_RANK) is x
    assert whole_rows(x, ONE_RANK) is x and own_chunk(x, ONE_RANK) is x and of_first_rank(x, ONE_RANK) is x
