"""Logical tensors: parameters as one process would hold them, and how tensor-parallel ranks cut them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LogicalTensor:
    """A whole tensor, of which a rank holds `cut(whole, tp_rank, tp_size)`."""

    shape: tuple[int, ...]
    dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks. None: every rank holds the whole tensor."""
    blocks: tuple[int, ...] = ()
    """Sizes of blocks along `dim` that are cut evenly by themselves, so that a rank has its part of queries,
    of keys and of values, or of gate and of up. Empty: one block."""

    def __post_init__(self) -> None:
        assert self.dim is not None or not self.blocks, self
        assert not self.blocks or sum(self.blocks) == self.shape[self.dim or 0], self

    def cut(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """The part of `whole` that tensor-parallel rank `rank` of `size` holds; a view if possible."""
        assert tuple(whole.shape) == self.shape, (whole.shape, self)
        if self.dim is None or size == 1:
            return whole
        parts = [block.chunk(size, self.dim)[rank] for block in whole.split(self._blocks, self.dim)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dim)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole from the parts of all tensor-parallel ranks, in rank order: the inverse of `cut`."""
        if self.dim is None or len(parts) == 1:
            return parts[0]
        local_blocks = [block // len(parts) for block in self._blocks]
        pieces = [part.split(local_blocks, self.dim) for part in parts]
        return torch.cat([piece for block in zip(*pieces, strict=True) for piece in block], self.dim)

    def cut_shape(self, size: int) -> tuple[int, ...]:
        """The shape of a part if `size` ranks share the whole."""
        return tuple(n // size if dim == self.dim else n for dim, n in enumerate(self.shape))

    @property
    def _blocks(self) -> list[int]:
        assert self.dim is not None
        return list(self.blocks or (self.shape[self.dim],))


def mark(parameter: nn.Parameter, logical: LogicalTensor) -> nn.Parameter:
    """Attach its logical tensor to a parameter; those that tensor-parallel ranks cut need it."""
    parameter.logical = logical  # type: ignore[attr-defined]
    return parameter


def logical_of(parameter: nn.Parameter) -> LogicalTensor:
    """The logical tensor of a parameter; an unmarked parameter is whole on every tensor-parallel rank.

    If ZeRO-3 has removed the values, their shape is in `ds_shape` (DeepSpeed 0.19.8).
    """
    marked = getattr(parameter, "logical", None)
    return marked or LogicalTensor(tuple(getattr(parameter, "ds_shape", parameter.shape)))
