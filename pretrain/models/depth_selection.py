"""Which tokens run in a layer, decided on the host from their scores, and what attention must know of them.

Copying a layer's scores to the host (4 bytes a token) is the one point where the model waits for its device.
It makes sizes plain ints again: from there on the chosen tokens are a shorter stream with the same rules as
the whole one (parallel/routing.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.stream.batch import Batch
from parallel.routing import Routing, tokens_of_towers
from pretrain.models.attention_mask import AttentionMask, Past, QueryMask, last_keys, mask_queries
from pretrain.models.depth_config import DepthConfig


@dataclass(frozen=True)
class TokenTable:
    """What routers know of all T tokens of a micro-batch beside scores. It stays on the host."""

    offsets: Int[np.ndarray, " tokens"]
    """int64, sorted order: offset of the token in sequence order, all sequences in one."""
    documents: Int[np.ndarray, " tokens"]
    """int64, sorted order: number of its document in the micro-batch; -1 for padding."""
    special: Bool[np.ndarray, " tokens"]
    """Sorted order: whether the token always runs."""
    segments: Int[np.ndarray, " tokens"]
    """int64, sequence order: number of the stretch in which attention sees it (AttentionMask.segments)."""
    spans: tuple[tuple[int, int, int], ...]
    """As of AttentionMask."""
    sequence_tokens: int


def token_table(batch: Batch, routing: Routing, mask: AttentionMask) -> TokenTable:
    """The table of a batch, made on the host."""
    order = routing.to_sorted.numpy()
    padding = batch.document_ids < 0
    # Documents are numbered anew in each sequence.
    numbers = batch.document_ids + batch.sequence_tokens * np.arange(batch.num_sequences)[:, None]
    documents = np.where(padding, -1, numbers).reshape(-1).astype(np.int64)
    special = batch.input_special.reshape(-1)
    return TokenTable(
        offsets=order.copy(),
        documents=documents[order],
        special=special[order] & (documents[order] >= 0),
        segments=np.repeat(np.arange(len(mask.segments)), mask.segments),
        spans=mask.spans,
        sequence_tokens=batch.sequence_tokens,
    )


def runs(
    config: DepthConfig,
    scores: Float[np.ndarray, " tokens"],
    documents: Int[np.ndarray, " tokens"],
    special: Bool[np.ndarray, " tokens"],
    ratio: float,
    *,
    threshold: float | None,
    causal: bool,
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens of a modality, in sequence order, run. `scores` are raw fp32 ones. `causal`: by the
    threshold, whatever the rule; None lets all through."""
    filled = documents >= 0
    if causal or config.rule == "threshold":
        if ratio >= 1 or threshold is None:
            return filled
        return filled & (special | (scores >= np.float32(threshold)))
    return special | top_k(scores, np.where(special, -1, documents), ratio)


def top_k(
    scores: Float[np.ndarray, " tokens"], documents: Int[np.ndarray, " tokens"], ratio: float
) -> Bool[np.ndarray, " tokens"]:
    """The trunc(ratio n) highest scores of each document of n tokens, of equal ones the earlier. Documents
    below 0 have none."""
    chosen = np.zeros(scores.size, bool)
    (free,) = np.nonzero(documents >= 0)
    if not free.size:
        return chosen
    order = free[np.lexsort((free, -scores[free], documents[free]))]
    _, starts, sizes = np.unique(documents[order], return_index=True, return_counts=True)
    # 1e-9: 0.29 * 100 is 28.999999999999996.
    allowed = np.floor(sizes * ratio + 1e-9).astype(int)
    rank = np.arange(order.size) - np.repeat(starts, sizes)
    chosen[order[rank < np.repeat(allowed, sizes)]] = True
    return chosen


@dataclass(frozen=True)
class ChosenTokens:
    """The tokens that run in a block, as a stream of their own."""

    rows: Int[Tensor, " chosen"]
    """int64, ascending: their rows in the sorted order of all tokens."""
    routing: Routing
    mask: AttentionMask | QueryMask
    """Between them, or of them as queries over all tokens."""
    visible_pairs: int
    """(query, key) pairs that the mask shows, padding left out."""

    def to(self, device: torch.device) -> "ChosenTokens":
        return replace(
            self,
            rows=_move(self.rows, device),
            routing=self.routing.to(device),
            mask=self.mask.to(device),
        )


def choose_tokens(
    runs: Bool[np.ndarray, " tokens"],
    table: TokenTable,
    counts: Sequence[int],
    *,
    keys: str,
    with_tokens: bool = False,
    past: Past | None = None,
) -> ChosenTokens:
    """`runs`: in sorted order, of towers of `counts` tokens. `with_tokens`: with `Routing.tokens`. `past`: of
    the mask of all tokens."""
    (rows,) = np.nonzero(runs)
    offsets = table.offsets[rows]
    to_sequence = np.argsort(offsets, kind="stable")
    to_sorted = np.empty_like(to_sequence)
    to_sorted[to_sequence] = np.arange(rows.size)
    filled = table.documents[rows] >= 0
    ends, sequences = np.cumsum(counts), len(table.offsets) // table.sequence_tokens
    per_tower = np.diff(np.searchsorted(rows, np.concatenate(([0], ends)))).tolist()
    routing = Routing(
        counts=tuple(per_tower),
        to_sorted=torch.from_numpy(to_sorted),
        to_sequence=torch.from_numpy(to_sequence),
        identity=bool((to_sorted == np.arange(rows.size)).all()),
        tokens=tokens_of_towers(per_tower, offsets, filled, sequences, table.sequence_tokens)
        if with_tokens
        else (),
    )
    offsets = offsets[to_sequence]
    mask, seen = _mask_of(offsets, table, keys)
    mask = replace(mask, past=past)
    return ChosenTokens(torch.from_numpy(rows), routing, mask, int(seen[filled[to_sequence]].sum()))


def _mask_of(
    offsets: Int[np.ndarray, " chosen"], table: TokenTable, keys: str
) -> tuple[AttentionMask | QueryMask, Int[np.ndarray, " chosen"]]:
    """(the mask of the tokens at `offsets`, in sequence order; how many keys it shows to each of them)."""
    segments = table.segments[offsets]
    if keys == "selected":
        lengths = tuple(np.unique(segments, return_counts=True)[1].tolist())
        # All vectors of an image run, so its span is as long as it was.
        spans = tuple(tuple(np.searchsorted(offsets, edges).tolist()) for edges in table.spans)
        seen = last_keys(spans, offsets.size) - np.searchsorted(segments, segments) + 1
        documents = torch.from_numpy(segments.astype(np.int32))[None]
        return AttentionMask(documents, lengths, spans=spans), seen
    last = last_keys(table.spans, len(table.segments))[offsets]
    seen = last - np.searchsorted(table.segments, segments) + 1
    return mask_queries(offsets, table.segments, last), seen


def _move(x: Tensor, device: torch.device) -> Tensor:
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
