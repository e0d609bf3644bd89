"""The routing of tokens to towers: the order in which a micro-batch travels through the decoder.

    sequence order   t t i i i t s s        for attention: documents, positions, causality
    sorted order     t t t | i i i | s s    for all other layers: one contiguous slice per tower

The modality is known before the model runs, so both permutations are made on the host with the batch, and the
sizes of slices are Python ints. Nothing needs a mask, a scatter or a device sync.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Integer, Shaped
from torch import Tensor


@dataclass(frozen=True)
class TowerTokens:
    """The tokens of one tower without padding, among which routers choose."""

    rows: Integer[Tensor, " tokens"] | None
    """int64, rows of the tower's slice, in sequence order; None: all rows, in their order."""
    per_sequence: tuple[int, ...]
    """Number of tokens per sequence."""

    def to(self, device: torch.device) -> "TowerTokens":
        """The same tokens, with `rows` on `device`."""
        return self if self.rows is None else replace(self, rows=self.rows.to(device, non_blocking=True))


@dataclass(frozen=True)
class Routing:
    """The routing of the T tokens of a micro-batch, flat over its sequences. `route` makes it."""

    counts: tuple[int, ...]
    """Tokens per tower, 0 if its modalities are absent; the sum is T."""
    to_sorted: Integer[Tensor, " tokens"]
    """int64: sorted = sequence[to_sorted]."""
    to_sequence: Integer[Tensor, " tokens"]
    """int64: sequence = sorted[to_sequence]; the inverse of to_sorted."""
    identity: bool
    """Whether both orders are the same, as with one tower, so that nothing is moved."""
    modality_rows: tuple[tuple[int, int], ...] = ()
    """(first row, row after the last) of every modality in sorted order, if `route` sorted by modality."""
    tokens: tuple[TowerTokens, ...] = ()
    """The tokens of every tower, for models that choose among tokens (`tokens_of_towers`)."""

    def to(self, device: torch.device) -> "Routing":
        """The same routing with its permutations on `device`."""
        return replace(
            self,
            to_sorted=self.to_sorted.to(device, non_blocking=True),
            to_sequence=self.to_sequence.to(device, non_blocking=True),
            tokens=tuple(tokens.to(device) for tokens in self.tokens),
        )


def route(
    modality: Integer[np.ndarray, " tokens"],
    tower_of_modality: Sequence[int],
    num_towers: int,
    *,
    by_modality: bool = False,
) -> Routing:
    """Sort tokens by tower with a stable sort, so that inside a tower sorted order is sequence order.

    `modality` holds indices into `tower_of_modality`, which holds tower indices below `num_towers`. With
    `by_modality`, tokens are sorted by modality inside a tower, so that a modality is a slice too.
    """
    tower = np.asarray(tower_of_modality, dtype=np.uint8)[modality]
    counts = tuple(int(count) for count in np.bincount(tower, minlength=num_towers))
    assert len(counts) == num_towers, (counts, num_towers)
    if not by_modality:
        return _sorted_by(tower, counts, sum(count > 0 for count in counts) <= 1)
    # Modalities are sorted by their towers.
    order = sorted(range(len(tower_of_modality)), key=lambda m: tower_of_modality[m])
    position = np.argsort(order)
    ends = np.cumsum(np.bincount(position[modality], minlength=len(order))).tolist()
    rows = list(zip([0, *ends[:-1]], ends, strict=True))
    routing = _sorted_by(position.astype(np.uint8)[modality], counts, np.unique(modality).size <= 1)
    return replace(routing, modality_rows=tuple(rows[p] for p in position))


def _sorted_by(key: Integer[np.ndarray, " tokens"], counts: tuple[int, ...], identity: bool) -> Routing:
    """The routing that sorts tokens by `key`."""
    to_sorted = np.argsort(key, kind="stable")
    to_sequence = np.empty_like(to_sorted)
    to_sequence[to_sorted] = np.arange(to_sorted.size)
    return Routing(
        counts=counts,
        to_sorted=torch.from_numpy(to_sorted),
        to_sequence=torch.from_numpy(to_sequence),
        identity=identity,
    )


def tokens_of_towers(
    counts: Sequence[int],
    positions: Integer[np.ndarray, " rows"],
    filled: Bool[np.ndarray, " rows"],
    num_sequences: int,
    sequence_tokens: int,
) -> tuple[TowerTokens, ...]:
    """The tokens of every tower, from rows in sorted order of which a tower has `counts`.

    `positions`: the rows' positions in sequence order, flat over all slots of the sequences; `filled`:
    whether a row holds a token and not padding.
    """
    towers, start = [], 0
    for count in counts:
        own = positions[start : start + count]
        # A slice of several modalities may be sorted by modality.
        rows = own.argsort(kind="stable")
        rows = rows[filled[start : start + count][rows]]
        per_sequence = np.bincount(own[rows] // sequence_tokens, minlength=num_sequences)
        in_order = np.array_equal(rows, np.arange(count))
        towers.append(TowerTokens(None if in_order else torch.from_numpy(rows), tuple(per_sequence.tolist())))
        start += count
    return tuple(towers)


class _Permute(torch.autograd.Function):
    """x[index] with the gradient grad[inverse]; autograd's own gradient would add row by row into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def sequence_to_sorted(x: Shaped[Tensor, "tokens ..."], routing: Routing) -> Shaped[Tensor, "tokens ..."]:
    """Permute rows from sequence order to sorted order; `x` itself if the orders are the same."""
    return x if routing.identity else _Permute.apply(x, routing.to_sorted, routing.to_sequence)


def sorted_to_sequence(x: Shaped[Tensor, "tokens ..."], routing: Routing) -> Shaped[Tensor, "tokens ..."]:
    """The inverse of `sequence_to_sorted`."""
    return x if routing.identity else _Permute.apply(x, routing.to_sequence, routing.to_sorted)
