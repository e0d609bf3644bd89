"""Which tokens a token sees: a function of its document, and how each attention kernel is told.

The function is `visible`. Flex attention takes it as it is, with the blocks in which it is not all false.
Torch has no flex gradient on CPU; there the same function is one causal call per document (`segments`), and
one more for each image that sees itself whole (`spans`). No kernel is given a matrix of [context, context].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Side of a block of flex attention, in tokens: its default, and what its kernels are tuned for."""


class Past(Protocol):
    """Attention that also looks at keys and values of earlier passes, and remembers those of this pass. A
    document of the pass may continue one of an earlier pass; arguments are those of `attend` and
    `attend_queries` (pretrain/models/attention.py), with the name of the attention layer."""

    def attend(
        self,
        layer: str,
        qkv: Float[Tensor, "tokens features"],
        mask: "AttentionMask",
        heads: tuple[int, int, int],
    ) -> Float[Tensor, "tokens query_features"]: ...

    def attend_queries(
        self,
        layer: str,
        q: Float[Tensor, "chosen query_features"],
        k: Float[Tensor, "tokens kv_features"],
        v: Float[Tensor, "tokens kv_features"],
        mask: "QueryMask",
        heads: tuple[int, int, int],
    ) -> Float[Tensor, "chosen query_features"]: ...


@dataclass(frozen=True)
class AttentionMask:
    """Made by `mask_documents`, moved by `to`. B sequences of S tokens, in sequence order."""

    documents: Int[Tensor, "sequences context"]
    """int32; never decreasing along a sequence. Padding is a document of its own."""
    segments: tuple[int, ...]
    """Lengths of the documents, flat over the sequences: they add up to B * S."""
    block_mask: BlockMask | None = None
    """On CUDA: `visible` and its blocks, for flex attention. None: attention goes segment by segment."""
    past: Past | None = None
    """Where the documents begin in earlier passes: how they are attended to. None: they begin here."""
    spans: tuple[tuple[int, int, int], ...] = ()
    """(start of its document, first token, token behind the last) of every image whose vectors see each other
    both ways, ascending and flat over the sequences."""

    def to(self, device: torch.device) -> "AttentionMask":
        """On `device`, in the form that its attention kernel takes."""
        moved = replace(self, documents=self.documents.to(device, non_blocking=True))
        flex = device.type == "cuda" and self.segments and self.past is None
        return moved.with_blocks() if flex else moved

    def with_blocks(self) -> "AttentionMask":
        """The same mask for flex attention. Block lists are made on the host from the documents' lengths."""
        context = self.documents.shape[1]
        device = self.documents.device
        runs = _runs(self.segments, context)
        last = last_keys(self.spans, runs.size).reshape(runs.shape) - context * np.arange(len(runs))[:, None]
        lists = [
            torch.from_numpy(values).unsqueeze(1).to(device, non_blocking=True)
            for values in _block_lists(runs, last)
        ]
        keys = torch.from_numpy(last.astype(np.int32)).to(device, non_blocking=True) if self.spans else None
        block_mask = BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=BLOCK, mask_mod=visible(self.documents, keys), seq_lengths=(context, context)
        )
        return replace(self, block_mask=block_mask)


@dataclass(frozen=True)
class QueryMask:
    """The mask says which of the T tokens of a micro-batch a chosen query sees; `mask_queries` makes it."""

    offsets: Int[Tensor, " queries"]
    """int32, ascending: offsets of the queries in sequence order, over all sequences."""
    last: Int[Tensor, " queries"]
    """int32, ascending: offset of the last token that each query sees: the last of its image, or itself."""
    documents: Int[Tensor, " tokens"]
    """int32, ascending: number of each token's document, over all sequences."""
    lengths: tuple[tuple[int, int], ...]
    """(queries, tokens) of each document."""
    block_mask: BlockMask | None = None
    """As of AttentionMask."""
    past: Past | None = None
    """As of AttentionMask."""

    def to(self, device: torch.device) -> "QueryMask":
        """On `device`, in the form that its attention kernel takes."""
        if device.type != "cuda" or not self.offsets.shape[0] or self.past is not None:
            offsets, last, documents = (x.to(device) for x in (self.offsets, self.last, self.documents))
            return replace(self, offsets=offsets, last=last, documents=documents)
        return self.with_blocks(device)

    def with_blocks(self, device: torch.device) -> "QueryMask":
        """The same mask on `device` for flex attention. Block lists are made on the host: called there."""
        offsets, last, documents = (x.to(device) for x in (self.offsets, self.last, self.documents))
        lists = [
            torch.from_numpy(values)[None, None].to(device, non_blocking=True)
            for values in _query_block_lists(self.offsets.numpy(), self.last.numpy(), self.documents.numpy())
        ]

        def up_to_last_in_document(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (last[query] >= key) & (documents[offsets[query]] == documents[key])

        block_mask = BlockMask.from_kv_blocks(
            *lists,
            BLOCK_SIZE=BLOCK,
            mask_mod=up_to_last_in_document,
            seq_lengths=(offsets.shape[0], documents.shape[0]),
        )
        return replace(self, offsets=offsets, last=last, documents=documents, block_mask=block_mask)


def mask_queries(offsets: np.ndarray, documents: np.ndarray, last: np.ndarray | None = None) -> QueryMask:
    """Attention inside documents, of queries at `offsets` over all tokens, each up to the key `last`; None:
    up to itself. All ascend."""
    tokens = np.bincount(documents)
    queries = np.bincount(documents[offsets], minlength=tokens.size)
    return QueryMask(
        torch.from_numpy(offsets.astype(np.int32)),
        torch.from_numpy((offsets if last is None else last).astype(np.int32)),
        torch.from_numpy(documents.astype(np.int32)),
        tuple(zip(queries.tolist(), tokens.tolist(), strict=True)),
    )


def visible(
    documents: Int[Tensor, "sequences context"], last: Int[Tensor, "sequences context"] | None = None
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(sequence, head, query position, key position) -> may the query see the key? In flex attention's form.

    `last`: position of the last key that each token may see, such as the end of its image; None: itself."""

    def causal_in_document(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[sequence, query] == documents[sequence, key])

    def up_to_last_in_document(sequence: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert last is not None
        return (last[sequence, query] >= key) & (documents[sequence, query] == documents[sequence, key])

    return causal_in_document if last is None else up_to_last_in_document


def last_keys(spans: Sequence[tuple[int, int, int]], tokens: int) -> Int[np.ndarray, " tokens"]:
    """The last key that each of `tokens` tokens sees: the last of its span, or itself. It ascends. `spans`:
    as of AttentionMask."""
    last = np.arange(tokens)
    for _, first, end in spans:
        last[first:end] = end - 1
    return last


def mask_documents(
    document_ids: Integer[np.ndarray, "sequences context"],
    *,
    within: bool,
    spans: Sequence[tuple[int, int]] = (),
) -> AttentionMask:
    """Mask of a batch on the host. `document_ids` ascend along a sequence and end in -1 for padding.

    `within` = False lets attention cross the documents of a sequence, never sequences. `spans`: (first token,
    token behind the last) of images that see themselves whole, flat over the sequences.
    """
    documents = np.where(document_ids < 0, np.iinfo(np.int32).max, document_ids).astype(np.int32)
    if not within:
        documents = np.zeros_like(documents)
    starts = np.ones_like(documents, dtype=bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = np.append(np.flatnonzero(starts), documents.size)
    longer = sorted((first, end) for first, end in spans if end - first > 1)  # one vector sees itself anyway
    begins = edges[np.searchsorted(edges, [first for first, _ in longer], side="right") - 1].tolist()
    return AttentionMask(
        torch.from_numpy(documents),
        tuple(np.diff(edges).tolist()),
        spans=tuple((begin, *span) for begin, span in zip(begins, longer, strict=True)),
    )


def _runs(segments: tuple[int, ...], context: int) -> np.ndarray:
    """[sequences, context]: number of each token's segment."""
    return np.repeat(np.arange(len(segments)), segments).reshape(-1, context)


def _block_lists(runs: np.ndarray, last_keys: np.ndarray) -> tuple[np.ndarray, ...]:
    """(partial counts, partial indices, full counts, full indices) of key blocks per query block, all int32.

    Counts are [sequences, blocks], indices [sequences, blocks, blocks] with the listed blocks first. Segments
    and last keys ascend, so the first and last token of a block tell everything: a key block is seen in part
    if it begins before the query block's last key and its last segment reaches the query block's first, and
    whole if it ends before the last key of the first query and all tokens of both belong to one segment.
    """
    context = runs.shape[1]
    first, first_keys = runs[:, ::BLOCK], np.arange(0, context, BLOCK)
    ends = np.minimum(first_keys + BLOCK, context) - 1
    last = runs[:, ends]
    seen = (first_keys <= last_keys[:, ends, None]) & (last[:, None, :] >= first[:, :, None])
    # Flex fills the last block up to its size with tokens that nobody sees.
    reached = first_keys + BLOCK - 1 <= last_keys[:, first_keys, None]
    full = reached & (first[:, None, :] == last[:, :, None]) & (last[:, None, :] == first[:, :, None])
    return _listed(seen & ~full, full)


def _query_block_lists(
    offsets: np.ndarray, last_keys: np.ndarray, documents: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Return what `_block_lists` does, for chosen queries over all tokens, with no dimension of sequences.

    Offsets, last keys and documents ascend, so again the first and last of a block tell everything.
    """

    def ends(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        last = np.minimum(np.arange(BLOCK, values.size + BLOCK, BLOCK), values.size) - 1
        return values[::BLOCK], values[last]

    first_offset, last_offset = ends(offsets)
    first_key, last_key = ends(np.arange(documents.size))
    first, last = documents[first_offset][:, None], documents[last_offset][:, None]
    least, most = (keys[:, None] for keys in ends(last_keys))
    seen = (first_key <= most) & (documents[last_key] >= first)
    full = (last_key <= least) & (documents[first_key] == last) & (documents[last_key] == first)
    return _listed(seen & ~full, full)


def _listed(partial: np.ndarray, full: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts and indices of the key blocks that are seen in part, then of those that are seen whole."""
    lists = []
    for chosen in (partial, full):
        lists.append(chosen.sum(-1, dtype=np.int32))
        lists.append(np.argsort(~chosen, axis=-1, kind="stable").astype(np.int32))
    return tuple(lists)
