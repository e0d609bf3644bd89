"""Tensor-parallel ranks of one stage, and what they exchange: rows of the token stream, and sums.

megatron-core's own gather and reduce-scatter (tensor_parallel/mappings.py, 0.16.1) allocate on CUDA whatever
the tensor's device; these allocate where the tensor is. Nothing here knows of towers: a collective moves the
tokens of all of them at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks that share a layer, as one of them sees it. The default is one rank alone."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    """Between a row-parallel layer and the next column-parallel one, each rank keeps an equal chunk of the
    sorted stream instead of all of it: norms and the residual stream cost 1 / size."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size and (self.group is not None or self.size == 1), self
        assert self.size > 1 or not self.sequence_parallel, self

    def chunk_counts(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Rows per tower of what this rank keeps, from those of the whole sorted stream."""
        if not self.sequence_parallel:
            return counts
        tokens = sum(counts)
        assert tokens % self.size == 0, f"{tokens} tokens are not cut evenly over {self.size} ranks"
        chunk = tokens // self.size
        first, last = self.rank * chunk, (self.rank + 1) * chunk
        kept, start = [], 0
        for count in counts:
            kept.append(max(0, min(start + count, last) - max(start, first)))
            start += count
        return tuple(kept)


ONE_RANK = TensorParallel()


def sum_(x: Tensor, tp: TensorParallel) -> Tensor:
    """`x`, in place, summed over tensor-parallel ranks. No gradient."""
    if tp.size > 1:
        dist.all_reduce(x, group=tp.group)
    return x


def gather_rows(x: Shaped[Tensor, "rows ..."], tp: TensorParallel) -> tuple[Tensor, Any]:
    """(the rows of all ranks in rank order, a handle to wait for before using them). No gradient."""
    whole = x.new_empty(x.shape[0] * tp.size, *x.shape[1:])
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=tp.group, async_op=True)
    return whole, handle


def scatter_sum(whole: Shaped[Tensor, "rows ..."], tp: TensorParallel) -> tuple[Tensor, Any]:
    """(this rank's chunk of the rows summed over ranks, a handle to wait for before using it). No
    gradient."""
    chunk = whole.new_empty(whole.shape[0] // tp.size, *whole.shape[1:])
    handle = dist.reduce_scatter_tensor(chunk, whole.contiguous(), group=tp.group, async_op=True)
    return chunk, handle


def combine(partial: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> Shaped[Tensor, "rows d_model"]:
    """The sum over ranks of their partial results: all rows, or with sequence parallel this rank's chunk."""
    if tp.size == 1:
        return partial
    return (_ScatterSum if tp.sequence_parallel else _Sum).apply(partial, tp)


def combine_gradient(partial: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> tuple[Tensor, Any]:
    """As `combine`, for the gradient of what a column-parallel layer was given: (result, handle or None)."""
    if tp.size == 1:
        return partial, None
    if tp.sequence_parallel:
        return scatter_sum(partial, tp)
    return partial, dist.all_reduce(partial, group=tp.group, async_op=True)


def whole_rows(x: Shaped[Tensor, "rows d_model"], tp: TensorParallel) -> Shaped[Tensor, "tokens d_model"]:
    """The whole stream from the chunks of sequence parallel, for layers that then keep all of it on every
    rank (they are given a `tp` without sequence parallel). Its gradient is the same on every rank, so a
    chunk's is a part of it; `own_chunk` is the way back."""
    return _WholeRows.apply(x, tp) if tp.sequence_parallel else x


def sum_gradient(x: Shaped[Tensor, "..."], tp: TensorParallel) -> Shaped[Tensor, "..."]:
    """`x`, whose gradient is summed over ranks: for what all ranks hold and each uses for a part of the
    features. What a column-parallel layer does for its own input."""
    return _SumGradient.apply(x, tp) if tp.size > 1 else x


def own_chunk(whole: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> Shaped[Tensor, "rows d_model"]:
    """This rank's chunk of a stream that all ranks hold: the inverse of `whole_rows`."""
    return _OwnChunk.apply(whole, tp) if tp.sequence_parallel else whole


def of_first_rank(x: Tensor, tp: TensorParallel) -> Tensor:
    """`x`, in place, as the first tensor-parallel rank has it: what must not differ by a bit. No gradient."""
    if tp.size > 1:
        dist.broadcast(x, group=tp.group, group_src=0)
    return x


def _whole(chunk: Tensor, tp: TensorParallel) -> Tensor:
    whole, handle = gather_rows(chunk, tp)
    handle.wait()
    return whole


def _chunk(whole: Tensor, tp: TensorParallel) -> Tensor:
    return whole.chunk(tp.size)[tp.rank].clone()  # a view would keep the whole alive


class _WholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _whole(x, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _chunk(grad, ctx.tp), None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return sum_(grad.clone(memory_format=torch.contiguous_format), ctx.tp), None


class _OwnChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        return _chunk(whole, tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _whole(grad, ctx.tp), None


class _Sum(torch.autograd.Function):
    # megatron-core's own gives back its input unsummed where that is not contiguous (mappings.py, _reduce).
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tp: TensorParallel) -> Tensor:
        return sum_(partial.clone(), tp)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, tp: TensorParallel) -> Tensor:
        ctx.tp = tp
        chunk, handle = scatter_sum(partial, tp)
        handle.wait()
        return chunk

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _whole(grad, ctx.tp), None
