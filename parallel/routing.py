"""Which tower computes which token: the order in which a micro-batch travels through the decoder.

    sequence order   t t i i i t s s        attention sees this: documents, positions, causality
    sorted order     t t t | i i i | s s    all else sees this: one contiguous slice per tower

Modality is known before the model runs, so both permutations are made on the host together with the batch,
and the sizes of the slices are Python ints: no mask, no scatter, no question to the device.
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
    """The tokens of one tower without padding: what layers choose among."""

    rows: Integer[Tensor, " tokens"] | None
    """int64, rows of the tower's slice, in sequence order; None: all of them, as they are."""
    per_sequence: tuple[int, ...]

    def to(self, device: torch.device) -> "TowerTokens":
        return self if self.rows is None else replace(self, rows=self.rows.to(device, non_blocking=True))


@dataclass(frozen=True)
class Routing:
    """Made by `route`. T tokens of a micro-batch, flat over its sequences."""

    counts: tuple[int, ...]
    """Tokens per tower; 0 where a tower's modalities are absent. Adds up to T."""
    to_sorted: Integer[Tensor, " tokens"]
    """int64: sorted = sequence[to_sorted]."""
    to_sequence: Integer[Tensor, " tokens"]
    """int64: sequence = sorted[to_sequence]; the inverse of to_sorted."""
    identity: bool
    """All tokens belong to one tower: both orders are the same and nothing need be moved."""
    modality_rows: tuple[tuple[int, int], ...] = ()
    """First row and the one after the last of each modality in sorted order; only where `route` sorted by
    them."""
    tokens: tuple[TowerTokens, ...] = ()
    """Per tower; only for models that choose among tokens (`tokens_of_towers`)."""

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
    """Sort tokens by tower, stably: inside a tower, sorted order is sequence order.

    `modality` holds indices into `tower_of_modality`, which holds tower indices below `num_towers`.
    `by_modality`: inside a tower sort by modality, so that each is a slice too, of the dense model as well.
    """
    tower = np.asarray(tower_of_modality, dtype=np.uint8)[modality]
    counts = tuple(int(count) for count in np.bincount(tower, minlength=num_towers))
    assert len(counts) == num_towers, (counts, num_towers)
    if not by_modality:
        return _sorted_by(tower, counts, sum(count > 0 for count in counts) <= 1)
    # Modalities in the order of their towers.
    order = sorted(range(len(tower_of_modality)), key=lambda m: tower_of_modality[m])
    place = np.argsort(order)
    ends = np.cumsum(np.bincount(place[modality], minlength=len(order))).tolist()
    rows = list(zip([0, *ends[:-1]], ends, strict=True))
    routing = _sorted_by(place.astype(np.uint8)[modality], counts, np.unique(modality).size <= 1)
    return replace(routing, modality_rows=tuple(rows[p] for p in place))


def _sorted_by(key: Integer[np.ndarray, " tokens"], counts: tuple[int, ...], identity: bool) -> Routing:
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
    offsets: Integer[np.ndarray, " rows"],
    filled: Bool[np.ndarray, " rows"],
    num_sequences: int,
    sequence_tokens: int,
) -> tuple[TowerTokens, ...]:
    """TowerTokens of each tower, for rows in sorted order, `counts` of each tower. `offsets`: of the rows in
    sequence order, all sequences in one; `filled`: which rows are no padding."""
    found, start = [], 0
    for count in counts:
        mine = offsets[start : start + count]
        # A slice of several modalities may be sorted by them.
        rows = mine.argsort(kind="stable")
        rows = rows[filled[start : start + count][rows]]
        per_sequence = np.bincount(mine[rows] // sequence_tokens, minlength=num_sequences)
        as_they_are = np.array_equal(rows, np.arange(count))
        found.append(
            TowerTokens(None if as_they_are else torch.from_numpy(rows), tuple(per_sequence.tolist()))
        )
        start += count
    return tuple(found)


class _Permute(torch.autograd.Function):
    """x[index] whose gradient is grad[inverse]: autograd's own would add row by row into zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


def sequence_to_sorted(x: Shaped[Tensor, "tokens ..."], routing: Routing) -> Shaped[Tensor, "tokens ..."]:
    """Rows from sequence into sorted order; `x` itself where the orders are the same."""
    return x if routing.identity else _Permute.apply(x, routing.to_sorted, routing.to_sequence)


def sorted_to_sequence(x: Shaped[Tensor, "tokens ..."], routing: Routing) -> Shaped[Tensor, "tokens ..."]:
    """The inverse of `sequence_to_sorted`."""
    return x if routing.identity else _Permute.apply(x, routing.to_sequence, routing.to_sorted)
