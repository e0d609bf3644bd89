"""Muon's steps where ranks hold parts of matrices.

Momentum is elementwise, so each rank keeps that of the elements that it updates. Orthogonalising an update
needs the whole matrix. Of a group that ZeRO has joined to one flat tensor and cut over data-parallel ranks,
most matrices lie in one rank's partition, and that rank orthogonalises them alone; the parts of a matrix on
a border are joined over ranks first. Tensor-parallel ranks then gather the parts of a matrix, and each of
them computes the same. Both travel in bf16, in which Newton-Schulz computes, so values do not depend on the
layout. Newton-Schulz is that of torch.optim.Muon (torch 2.13, optim/_muon.py).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim._muon import DEFAULT_A, DEFAULT_B, DEFAULT_C, _zeropower_via_newtonschulz

from parallel.logical import LogicalTensor, logical_of
from parallel.muon import MuonSettings
from parallel.world import World

_COEFFICIENTS = (DEFAULT_A, DEFAULT_B, DEFAULT_C)


@dataclass(frozen=True)
class _Matrix:
    """This tensor-parallel rank's part of a matrix, whose elements are `start` to `stop` of a flat tensor."""

    start: int
    stop: int
    logical: LogicalTensor
    """Of the matrix; for a stack of experts' matrices that of one of them."""
    pieces: tuple[int, ...]
    """Rows of the whole matrix that are orthogonalised together."""


class MuonWithAdamW(torch.optim.Optimizer):
    """One optimizer for parameters, and for the flat partitions of them that ZeRO-1 puts into its groups."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        settings: MuonSettings,
        *,
        betas: tuple[float, float],
        eps: float,
        world: World | None = None,
    ) -> None:
        """`world`: the ranks that share the parameters; None: one process holds them whole."""
        self._adamw = torch.optim.AdamW([torch.zeros(1)], betas=betas, eps=eps, fused=True)
        super().__init__([dict(group) for group in groups], self._adamw.defaults)
        self._settings, self._world = settings, world
        tp_size = 1 if world is None else world.tp_size
        self._of_group = {
            group["name"]: [
                list(_matrices(logical_of(parameter), pieces, tp_size))
                for parameter, pieces in zip(group["params"], group["pieces"], strict=True)
            ]
            for group in self.param_groups
            if "pieces" in group
        }
        """By group, then by parameter: its matrices, counted from the parameter's start."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        assert closure is None
        # DeepSpeed replaces the list of groups and their parameters, so AdamW takes what is there now.
        self._adamw.state = self.state
        self._adamw.param_groups = [group for group in self.param_groups if "pieces" not in group]
        if self._adamw.param_groups:
            self._adamw.step()
        for group in self.param_groups:
            if "pieces" in group:
                self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        of_parameter = self._of_group[group["name"]]
        masters = group["params"]
        if masters[0].ndim > 1:  # the parameters themselves
            for master, matrices in zip(masters, of_parameter, strict=True):
                if master.grad is not None:
                    self._step_flat(master, matrices, group, dp_rank=0, dp_size=1)
            return
        (partition,) = masters
        if partition.grad is None:  # on all ranks: the update was refused
            return
        ends = [0, *accumulate(matrices[-1].stop for matrices in of_parameter)]
        joined = [
            replace(matrix, start=matrix.start + at, stop=matrix.stop + at)
            for at, matrices in zip(ends[:-1], of_parameter, strict=True)
            for matrix in matrices
        ]
        assert self._world is not None
        dp_rank, dp_size = self._world.dp_rank, self._world.dp_size
        self._step_flat(partition, joined, group, dp_rank=dp_rank, dp_size=dp_size)

    def _step_flat(
        self,
        master: Tensor,
        matrices: Sequence[_Matrix],
        group: dict[str, Any],
        *,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        """Update `master`, which is part `dp_rank` of `dp_size` equal parts of a flat tensor of matrices."""
        update = self._momentum(master).to(torch.bfloat16).view(-1)
        flat, size = master.view(-1), update.numel()
        first, last = dp_rank * size, (dp_rank + 1) * size
        master.mul_(1 - group["lr"] * group["weight_decay"])
        border = [m for m in matrices if m.start // size != (m.stop - 1) // size] if dp_size > 1 else []
        gathered = self._gather(update, border, first)
        for matrix in matrices:
            start, stop = max(matrix.start, first), min(matrix.stop, last)
            if start >= stop:
                continue
            part = gathered.get(matrix.start)
            if part is None:
                part = update[matrix.start - first : matrix.stop - first]
            own = slice(start - matrix.start, stop - matrix.start)
            for factor, direction in self._directions(part, matrix):
                # In one operation, as torch does it: another rounding here turns bits of later updates.
                flat[start - first : stop - first].add_(direction[own], alpha=-group["lr"] * factor)

    def _momentum(self, master: Tensor) -> Tensor:
        """The update before it is orthogonalised, in the form of torch.optim.Muon."""
        state, grad, beta = self.state[master], master.grad, self._settings.momentum
        assert grad is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=master.device)
            state["momentum_buffer"] = torch.zeros_like(master, requires_grad=False)
        state["step"] += 1
        buffer = state["momentum_buffer"].lerp_(grad, 1 - beta)
        return grad.lerp(buffer, beta) if self._settings.nesterov else buffer

    def _gather(self, update: Tensor, border: Sequence[_Matrix], first: int) -> dict[int, Tensor]:
        """By start, the updates of matrices that lie in several data-parallel ranks' partitions. A rank adds
        its own elements to zeros, so the sum over ranks rounds nothing."""
        if not border:
            return {}
        assert self._world is not None
        sizes = [matrix.stop - matrix.start for matrix in border]
        joined = update.new_zeros(sum(sizes))
        pieces = joined.split(sizes)
        last = first + update.numel()
        for matrix, piece in zip(border, pieces, strict=True):
            start, stop = max(matrix.start, first), min(matrix.stop, last)
            if start < stop:
                piece[start - matrix.start : stop - matrix.start] = update[start - first : stop - first]
        dist.all_reduce(joined, group=self._world.dp_group)
        return {matrix.start: piece for matrix, piece in zip(border, pieces, strict=True)}

    def _directions(self, part: Tensor, matrix: _Matrix) -> Iterator[tuple[float, Tensor]]:
        """(factor on the rate, this rank's part of the orthogonalised update, flat) for each factor that
        pieces of the matrix have; elements of pieces with another factor are 0."""
        tp_size, tp_rank = (1, 0) if self._world is None else (self._world.tp_size, self._world.tp_rank)
        whole = part.view(matrix.logical.cut_shape(tp_size))
        if tp_size > 1:
            assert self._world is not None
            parts = [torch.empty_like(whole) for _ in range(tp_size)]
            dist.all_gather(parts, whole.contiguous(), group=self._world.tp_group)
            whole = matrix.logical.join(parts)
        steps, eps = self._settings.ns_steps, self._settings.eps
        pieces = whole.split(matrix.pieces)
        found = [_zeropower_via_newtonschulz(piece, _COEFFICIENTS, steps, eps) for piece in pieces]
        factors = [_factor(self._settings.adjust_lr, *piece.shape) for piece in pieces]
        for factor in dict.fromkeys(factors):
            same = [p if f == factor else torch.zeros_like(p) for p, f in zip(found, factors, strict=True)]
            yield factor, matrix.logical.cut(torch.cat(same), tp_rank, tp_size).reshape(-1)


def _factor(adjust_lr: str, rows: int, columns: int) -> float:
    """The factor on the rate of a matrix, see MuonSettings.adjust_lr."""
    if adjust_lr == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1, rows / columns))


def _matrices(logical: LogicalTensor, pieces: tuple[int, ...], tp_size: int) -> Iterator[_Matrix]:
    """The matrices of a parameter: one, or one for each expert of a stack."""
    stacked, matrix = logical.shape[:-2], logical.shape[-2:]
    dim = None if logical.dim is None else logical.dim - len(stacked)
    one = LogicalTensor(matrix, dim, logical.blocks)
    size = math.prod(one.cut_shape(tp_size))
    for index in range(math.prod(stacked)):
        yield _Matrix(index * size, (index + 1) * size, one, pieces)
