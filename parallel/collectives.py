"""The collectives of the tensor-parallel ranks of one stage: gathers and sums of rows of the token stream.

megatron-core's gather and reduce-scatter (tensor_parallel/mappings.py, 0.16.1) always allocate on CUDA; these
functions allocate on the device of the tensor. A collective moves the tokens of all towers at once.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks that share a layer, as one of them sees them; by default a single rank."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False
    """Whether, between a row-parallel layer and the next column-parallel layer, a rank keeps an equal chunk
    of the sorted stream instead of all of it. Norms and the residual stream then cost 1 / size."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size and (self.group is not None or self.size == 1), self
        assert self.size > 1 or not self.sequence_parallel, self

    def chunk_counts(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """Rows per tower in this rank's chunk, from `counts` of the whole sorted stream."""
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
    """Sum `x` over tensor-parallel ranks, in place; returns it. No gradient."""
    if tp.size > 1:
        dist.all_reduce(x, group=tp.group)
    return x


def gather_rows(x: Shaped[Tensor, "rows ..."], tp: TensorParallel) -> tuple[Tensor, Any]:
    """(rows of all ranks in rank order, handle to wait for before they are used). No gradient."""
    whole = x.new_empty(x.shape[0] * tp.size, *x.shape[1:])
    handle = dist.all_gather_into_tensor(whole, x.contiguous(), group=tp.group, async_op=True)
    return whole, handle


def gather_columns(x: Shaped[Tensor, "rows columns"], tp: TensorParallel) -> Tensor:
    """The columns of all ranks in rank order, equal on all of them. No gradient."""
    if tp.size == 1:
        return x
    whole, handle = gather_rows(x.t(), tp)
    handle.wait()
    return whole.t()


def scatter_sum(whole: Shaped[Tensor, "rows ..."], tp: TensorParallel) -> tuple[Tensor, Any]:
    """(this rank's chunk of the sum over ranks, handle to wait for before it is used). No gradient."""
    chunk = whole.new_empty(whole.shape[0] // tp.size, *whole.shape[1:])
    handle = dist.reduce_scatter_tensor(chunk, whole.contiguous(), group=tp.group, async_op=True)
    return chunk, handle


def combine(partial: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> Shaped[Tensor, "rows d_model"]:
    """The sum of partial results over ranks: all rows, or this rank's chunk with sequence parallel."""
    if tp.size == 1:
        return partial
    return (_ScatterSum if tp.sequence_parallel else _Sum).apply(partial, tp)


def combine_gradient(partial: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> tuple[Tensor, Any]:
    """`combine` for the gradient of a column-parallel layer's input: (result, handle or None)."""
    if tp.size == 1:
        return partial, None
    if tp.sequence_parallel:
        return scatter_sum(partial, tp)
    return partial, dist.all_reduce(partial, group=tp.group, async_op=True)


def whole_rows(x: Shaped[Tensor, "rows d_model"], tp: TensorParallel) -> Shaped[Tensor, "tokens d_model"]:
    """The whole stream from the chunks of sequence parallel; without sequence parallel, `x` itself.

    It is for layers that keep the whole stream on every rank, with a `tp` without sequence parallel. Their
    gradient is the same on all ranks, so the gradient of a chunk is a slice of it. `own_chunk` is the
    inverse.
    """
    return _WholeRows.apply(x, tp) if tp.sequence_parallel else x


def sum_gradient(x: Shaped[Tensor, "..."], tp: TensorParallel) -> Shaped[Tensor, "..."]:
    """`x`, whose gradient is summed over ranks.

    It is for a tensor that all ranks hold and that every rank uses for other features. A column-parallel
    layer does the same for its input.
    """
    return _SumGradient.apply(x, tp) if tp.size > 1 else x


def own_chunk(whole: Shaped[Tensor, "tokens d_model"], tp: TensorParallel) -> Shaped[Tensor, "rows d_model"]:
    """This rank's chunk of a stream that all ranks hold: the inverse of `whole_rows`."""
    return _OwnChunk.apply(whole, tp) if tp.sequence_parallel else whole


def of_first_rank(x: Tensor, tp: TensorParallel) -> Tensor:
    """Overwrite `x` with the first tensor-parallel rank's, so that ranks agree bit for bit; returns it."""
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
    # megatron-core's sum returns a non-contiguous input without summing it (mappings.py, _reduce).
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
