"""A parameter as one process would hold it, and how tensor-parallel ranks cut it: what no layout changes."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class LogicalTensor:
    """The whole of a tensor of which a rank holds `cut(whole, tp_rank, tp_size)`."""

    shape: tuple[int, ...]
    dim: int | None = None
    """Dimension that is cut over tensor-parallel ranks. None: every rank holds all of it."""
    blocks: tuple[int, ...] = ()
    """Sizes along `dim`, in order, each cut evenly by itself: a rank has its part of queries, keys and
    values, or of gate and up. Empty: one block."""

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
        """Shape of a part where `size` ranks share the whole."""
        return tuple(n // size if dim == self.dim else n for dim, n in enumerate(self.shape))

    @property
    def _blocks(self) -> list[int]:
        assert self.dim is not None
        return list(self.blocks or (self.shape[self.dim],))


def mark(parameter: nn.Parameter, logical: LogicalTensor) -> nn.Parameter:
    """Attach what `logical_of` answers. For every parameter that tensor-parallel ranks cut."""
    parameter.logical = logical  # type: ignore[attr-defined]
    return parameter


def logical_of(parameter: nn.Parameter) -> LogicalTensor:
    """What the parameter is a part of; an unmarked parameter is whole on every tensor-parallel rank.

    Also right where ZeRO-3 has taken the values away: it leaves their shape in `ds_shape` (DeepSpeed 0.19.8).
    """
    marked = getattr(parameter, "logical", None)
    return marked or LogicalTensor(tuple(getattr(parameter, "ds_shape", parameter.shape)))
