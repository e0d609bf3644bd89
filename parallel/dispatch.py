"""Rows of a tower's slice on their way to its experts, products with the experts' weights, and the way back.

    a tower's slice      t0 t1 t2 t3          parallel/routing.py
    dispatched           t0 t3 | t1 t3        a slice per expert

Experts take copies of rows, in any number: a row may go to several of them, or to none. So an expert is one
more slice with a weight of its own, and the way back adds up what the experts made of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.collectives import ONE_RANK, TensorParallel
from parallel.logical import LogicalTensor
from parallel.towers import Initialise, tower_shards


@dataclass(frozen=True)
class ExpertAssignment:
    """What the experts of one tower take of its slice."""

    rows: tuple[Int[Tensor, " rows"], ...]
    """int64, rows of the slice; joined they are ordered by expert. No row is twice in one of them, so that
    the way back adds in a fixed order on every device."""
    ends: Int[Tensor, " experts"]
    """int32, on the device: where the rows of each expert end."""
    counts: tuple[int, ...] | None
    """Rows of each expert, on the host; None where nobody asks for them (`grouped`)."""

    @property
    def sizes(self) -> list[int]:
        """Of each of `rows`."""
        return [rows.shape[0] for rows in self.rows]


def grouped(x: Tensor) -> bool:
    """Whether the products of all experts are one grouped product, whose sizes stay on the device, so that it
    is never asked for them. torch 2.13 has that for bf16 on a GPU; elsewhere each expert is a product."""
    return x.is_cuda and x.dtype == torch.bfloat16


class DispatchedLinear(nn.Module):
    """x @ weight.T of every slice, with a weight [out, in] for a plain tower and [experts, out, in] for one
    with experts; cut over tensor-parallel ranks like the layers of parallel/towers.py, but without their
    collectives: those are for all towers and experts together, around a region of such layers."""

    def __init__(
        self, shapes: Mapping[str, LogicalTensor], initialise: Initialise, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        """`shapes`: weight shard -> its whole."""
        super().__init__()
        self.weight = nn.ParameterDict()
        for shard, logical in shapes.items():
            self.weight.update(tower_shards((shard,), initialise, logical, tp))

    def forward(self, pieces: Sequence[Tensor], taken: Sequence[ExpertAssignment | None]) -> list[Tensor]:
        """Of each tower [rows, in]: [rows, out]. `taken`: whose rows they are, None for a plain tower."""
        return [
            F.linear(x, weight) if by is None else _ExpertProducts.apply(x, weight, by)
            for x, by, weight in zip(pieces, taken, self.weight.values(), strict=True)
        ]


def dispatch(x: Float[Tensor, "tokens d"], taken: ExpertAssignment) -> Float[Tensor, "dispatched d"]:
    """Each expert's rows, expert by expert."""
    return _Dispatch.apply(x, taken)


def collect(
    y: Float[Tensor, "dispatched d"], taken: ExpertAssignment, tokens: int
) -> Float[Tensor, "tokens d"]:
    """For each row the sum of what its experts made of it; 0 where there was none. Transposed `dispatch`."""
    return _Collect.apply(y, taken, tokens)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: ExpertAssignment) -> Tensor:
        ctx.taken, ctx.tokens = taken, x.shape[0]
        return _spread(x, taken)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _add_up(grad, ctx.taken, ctx.tokens), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, taken: ExpertAssignment, tokens: int) -> Tensor:
        ctx.taken = taken
        return _add_up(y, taken, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _spread(grad, ctx.taken), None, None


def _spread(x: Tensor, taken: ExpertAssignment) -> Tensor:
    out = x.new_empty(sum(taken.sizes), x.shape[1])
    for rows, piece in zip(taken.rows, out.split(taken.sizes), strict=True):
        torch.index_select(x, 0, rows, out=piece)
    return out


def _add_up(y: Tensor, taken: ExpertAssignment, tokens: int) -> Tensor:
    out = y.new_zeros(tokens, y.shape[1])
    for rows, piece in zip(taken.rows, y.split(taken.sizes), strict=True):
        out.index_add_(0, rows, piece)
    return out


class _ExpertProducts(torch.autograd.Function):
    """Each expert's rows times its own weight of [experts, out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, taken: ExpertAssignment) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.taken = taken
        return _products(x, weight.mT, taken)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), taken = ctx.saved_tensors, ctx.taken
        grad_x = grad_weight = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = _products(grad, weight, taken)
        if ctx.needs_input_grad[1] and taken.counts is None:
            grad_weight = F.grouped_mm(grad.t(), x, offs=taken.ends)
        elif ctx.needs_input_grad[1]:
            # An expert without rows gets a gradient of zeros, not None.
            grad_weight = torch.empty_like(weight)
            for g, x_piece, place in zip(
                grad.split(taken.counts), x.split(taken.counts), grad_weight, strict=True
            ):
                torch.mm(g.t(), x_piece, out=place)
        return grad_x, grad_weight, None


def _products(x: Tensor, weight: Tensor, taken: ExpertAssignment) -> Tensor:
    """Each expert's rows times its weight of [experts, in, out]."""
    if taken.counts is None:
        return F.grouped_mm(x, weight, offs=taken.ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for x_piece, each, place in zip(x.split(taken.counts), weight, out.split(taken.counts), strict=True):
        torch.mm(x_piece, each, out=place)
    return out
