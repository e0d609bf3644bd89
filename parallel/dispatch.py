"""Experts of a tower: gather each expert's rows, multiply them with its weight, and sum back per token.

    a tower's slice      t0 t1 t2 t3          parallel/routing.py
    dispatched           t0 t3 | t1 t3        a slice per expert

Experts take copies of rows, so a row may go to several experts or to none. An expert is thus one more slice
with a weight of its own, and collecting sums the results of all experts of a row.
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
    """The rows of a tower's slice that its experts take."""

    rows: tuple[Int[Tensor, " rows"], ...]
    """int64, rows of the slice, ordered by expert when joined. No tensor holds a row twice, so that sums are
    added in a fixed order on all devices."""
    ends: Int[Tensor, " experts"]
    """int32, on the device: the end of every expert's rows."""
    counts: tuple[int, ...] | None
    """Number of rows of every expert, on the host; None if they are not needed (`grouped`)."""

    @property
    def sizes(self) -> list[int]:
        """The lengths of the tensors in `rows`."""
        return [rows.shape[0] for rows in self.rows]


def grouped(x: Tensor) -> bool:
    """Whether the products of all experts are one grouped product, whose sizes stay on the device.

    torch 2.13 has this for bf16 on a GPU. Elsewhere every expert is a product of its own.
    """
    return x.is_cuda and x.dtype == torch.bfloat16


class DispatchedLinear(nn.Module):
    """x @ weight.T for the slices of all towers: a weight is [out, in], or [experts, out, in] with experts.

    Weights are cut over tensor-parallel ranks like those of parallel/towers.py. The collectives are outside,
    once for all towers and experts, around a region of these layers.
    """

    def __init__(
        self, shapes: Mapping[str, LogicalTensor], initialise: Initialise, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        """`shapes`: the logical tensors by weight shard."""
        super().__init__()
        self.weight = nn.ParameterDict()
        for shard, logical in shapes.items():
            self.weight.update(tower_shards((shard,), initialise, logical, tp))

    def forward(
        self, pieces: Sequence[Tensor], assignments: Sequence[ExpertAssignment | None]
    ) -> list[Tensor]:
        """A result [rows, out] per tower, from a piece [rows, in] per tower.

        `assignments`: those that made the pieces; None for a tower without experts.
        """
        return [
            F.linear(x, weight) if by is None else _ExpertProducts.apply(x, weight, by)
            for x, by, weight in zip(pieces, assignments, self.weight.values(), strict=True)
        ]


def dispatch(x: Float[Tensor, "tokens d"], assignment: ExpertAssignment) -> Float[Tensor, "dispatched d"]:
    """The rows of all experts, ordered by expert."""
    return _Dispatch.apply(x, assignment)


def collect(
    y: Float[Tensor, "dispatched d"], assignment: ExpertAssignment, tokens: int
) -> Float[Tensor, "tokens d"]:
    """The sum over experts for every row, 0 for a row without expert. It is the transpose of `dispatch`."""
    return _Collect.apply(y, assignment, tokens)


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, assignment: ExpertAssignment) -> Tensor:
        ctx.assignment, ctx.tokens = assignment, x.shape[0]
        return _spread(x, assignment)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _add_up(grad, ctx.assignment, ctx.tokens), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, assignment: ExpertAssignment, tokens: int) -> Tensor:
        ctx.assignment = assignment
        return _add_up(y, assignment, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _spread(grad, ctx.assignment), None, None


def _spread(x: Tensor, assignment: ExpertAssignment) -> Tensor:
    """Copies of the assigned rows, ordered by expert."""
    out = x.new_empty(sum(assignment.sizes), x.shape[1])
    for rows, piece in zip(assignment.rows, out.split(assignment.sizes), strict=True):
        torch.index_select(x, 0, rows, out=piece)
    return out


def _add_up(y: Tensor, assignment: ExpertAssignment, tokens: int) -> Tensor:
    """The sum of the copies of every row."""
    out = y.new_zeros(tokens, y.shape[1])
    for rows, piece in zip(assignment.rows, y.split(assignment.sizes), strict=True):
        out.index_add_(0, rows, piece)
    return out


class _ExpertProducts(torch.autograd.Function):
    """The rows of every expert times its own weight, of weights [experts, out, in]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, assignment: ExpertAssignment) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.assignment = assignment
        return _products(x, weight.mT, assignment)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x, weight), assignment = ctx.saved_tensors, ctx.assignment
        grad_x = grad_weight = None
        grad = grad.contiguous()
        if ctx.needs_input_grad[0]:
            grad_x = _products(grad, weight, assignment)
        if ctx.needs_input_grad[1] and assignment.counts is None:
            grad_weight = F.grouped_mm(grad.t(), x, offs=assignment.ends)
        elif ctx.needs_input_grad[1]:
            # An expert without rows gets a gradient of zeros, not None.
            grad_weight = torch.empty_like(weight)
            for g, x_piece, out in zip(
                grad.split(assignment.counts), x.split(assignment.counts), grad_weight, strict=True
            ):
                torch.mm(g.t(), x_piece, out=out)
        return grad_x, grad_weight, None


def _products(x: Tensor, weight: Tensor, assignment: ExpertAssignment) -> Tensor:
    """The rows of every expert times its own weight, of weights [experts, in, out]."""
    if assignment.counts is None:
        return F.grouped_mm(x, weight, offs=assignment.ends)
    out = x.new_empty(x.shape[0], weight.shape[2])
    for x_piece, own, out_piece in zip(
        x.split(assignment.counts), weight, out.split(assignment.counts), strict=True
    ):
        torch.mm(x_piece, own, out=out_piece)
    return out
