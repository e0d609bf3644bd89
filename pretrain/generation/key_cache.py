"""Keys and values of the tokens that a model has read, so that a further token costs one token.

Keys are kept as attention sees them: normalised and rotated by the position of their token, which no later
token changes. A layer whose depth routers hide skipped tokens from attention (`keys = "selected"`) stores
the tokens that ran alone, so layers and sequences may hold different numbers of keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from pretrain.models.attention import attend, attend_queries
from pretrain.models.attention_mask import AttentionMask, QueryMask

_ROOM = 64
"""Keys per sequence by which a layer's store grows: copies are rare, and little memory is kept in vain."""
Heads = tuple[int, int, int]


@dataclass
class LayerKeys:
    """Keys and values of one attention layer; of sequence i the first lengths[i] rows are filled, the others
    are 0, or what a pass left there that was taken back."""

    keys: Float[Tensor, "sequences room kv_features"]
    values: Float[Tensor, "sequences room kv_features"]
    lengths: Int[np.ndarray, " sequences"]

    def grow(self, room: int) -> None:
        """Make room for `room` keys per sequence."""
        missing = room - self.keys.shape[1]
        if missing > 0:
            added = -(-missing // _ROOM) * _ROOM
            self.keys, self.values = (F.pad(x, (0, 0, 0, added)) for x in (self.keys, self.values))


@dataclass
class KeyCache:
    """The cache of a number of sequences. Passes (`begin_pass`) fill it, layer by layer."""

    lengths: Int[np.ndarray, " sequences"]
    """Tokens that each sequence has read: the position of its next token."""
    layers: dict[str, LayerKeys] = field(default_factory=dict)
    """Name of an attention layer -> its keys and values."""

    @classmethod
    def empty(cls, sequences: int) -> "KeyCache":
        return cls(np.zeros(sequences, np.int64))

    def begin_pass(
        self,
        sequences: Sequence[int],
        counts: Sequence[int],
        images: Sequence[tuple[int, int, int]] = (),
    ) -> "CachedPass":
        """A pass in which counts[k] tokens of sequence sequences[k] are read. Either all of these sequences
        are empty, or equally many tokens of all of them are read. `images`: AttentionMask.spans of the
        pass."""
        chosen = np.asarray(sequences, np.int64)
        first = not self.lengths[chosen].any()
        assert first or len(set(counts)) == 1, f"{counts} tokens behind {self.lengths[chosen]}"
        self.lengths[chosen] += np.asarray(counts)
        documents = np.repeat(np.arange(len(chosen)), counts)
        seen = np.arange(len(documents)) - np.searchsorted(documents, documents) + 1
        for document, start, end in images:
            seen[start:end] = end - document
        return CachedPass(self, chosen, documents, seen, first)

    def take_back(self, made: "CachedPass") -> None:
        """Forget the tokens of the last pass, which was not the first of its sequences."""
        counts = np.bincount(made.documents)
        for of in (self, *self.layers.values()):
            of.lengths[made.sequences] -= counts

    def select(self, sequences: Sequence[int]) -> "KeyCache":
        """A cache of these sequences; a sequence may be there several times, to be continued as often."""
        chosen = np.asarray(sequences, np.int64)
        layers = {
            name: LayerKeys(of.keys[rows], of.values[rows], of.lengths[chosen])
            for name, of in self.layers.items()
            for rows in [torch.from_numpy(chosen).to(of.keys.device)]
        }
        return KeyCache(self.lengths[chosen], layers)

    @property
    def held_bytes(self) -> int:
        """Bytes of the keys and values that are held, without the room that is kept for more."""
        return sum(
            2 * int(of.lengths.sum()) * of.keys.shape[2] * of.keys.element_size()
            for of in self.layers.values()
        )


@dataclass(frozen=True)
class CachedPass:
    """One pass over new tokens of some sequences: the `past` of its attention masks."""

    cache: KeyCache
    sequences: Int[np.ndarray, " documents"]
    """The sequence that each document of the pass belongs to."""
    documents: Int[np.ndarray, " tokens"]
    """Ascending: the document of each token of the pass."""
    seen: Int[np.ndarray, " tokens"]
    """Tokens of its document in the pass that each token sees, of which they are the first."""
    first: bool
    """Whether the documents begin in this pass, so that it computes what a pass without a cache does."""

    def attend(self, layer: str, qkv: Tensor, mask: AttentionMask, heads: Heads) -> Tensor:
        """Attention of tokens of the pass, whose keys and values are stored."""
        head_dim = qkv.shape[1] // sum(heads)
        q, k, v = qkv.split([count * head_dim for count in heads], dim=1)
        documents = self._documents(mask.documents.flatten())
        self._store(layer, k, v, documents)
        if self.first:
            return attend(qkv, replace(mask, past=None), heads)
        return self._attend_behind(layer, q, documents, heads)

    def attend_queries(
        self, layer: str, q: Tensor, k: Tensor, v: Tensor, mask: QueryMask, heads: Heads
    ) -> Tensor:
        """Attention of queries at some of the tokens; keys and values of all tokens are stored."""
        self._store(layer, k, v, self.documents)
        if self.first:
            return attend_queries(q, k, v, replace(mask, past=None), heads)
        return self._attend_behind(layer, q, self._documents(mask.documents[mask.offsets]), heads)

    def _documents(self, chosen: Int[Tensor, " rows"]) -> Int[np.ndarray, " rows"]:
        """The documents of chosen tokens, on the host; a device is asked only where tokens were left out."""
        return self.documents if len(chosen) == len(self.documents) else chosen.cpu().numpy()

    def _store(self, layer: str, k: Tensor, v: Tensor, documents: Int[np.ndarray, " rows"]) -> None:
        """Append keys and values [rows, kv_features] to those of their sequences."""
        of = self.cache.layers.get(layer)
        if of is None:
            empty = k.new_zeros(len(self.cache.lengths), 0, k.shape[1])
            of = LayerKeys(empty, empty, np.zeros(len(self.cache.lengths), np.int64))
            self.cache.layers[layer] = of
        if not len(documents):
            return
        sequences = self.sequences[documents]
        inside = np.arange(len(documents)) - np.searchsorted(documents, documents)
        offsets = of.lengths[sequences] + inside
        of.grow(int(offsets.max()) + 1)
        where = (torch.from_numpy(sequences).to(k.device), torch.from_numpy(offsets).to(k.device))
        of.keys[where], of.values[where] = k, v
        np.add.at(of.lengths, sequences, 1)

    def _attend_behind(
        self, layer: str, q: Tensor, documents: Int[np.ndarray, " queries"], heads: Heads
    ) -> Tensor:
        """Attention of the last tokens of sequences, whose keys are stored, over all keys that they see."""
        if not len(documents):
            return q
        count = len(self.documents) // len(self.sequences)
        # Behind other tokens, only a single one may skip the layer.
        assert count == 1 or len(documents) == len(self.documents), "tokens of an image skip a layer"
        of, sequences = self.cache.layers[layer], self.sequences[documents[::count]]
        lengths = of.lengths[sequences]
        longest = int(lengths.max())
        keys, values = of.keys[:, :longest], of.values[:, :longest]
        if not np.array_equal(sequences, np.arange(len(of.lengths))):
            rows = torch.from_numpy(sequences).to(q.device)
            keys, values = keys.index_select(0, rows), values.index_select(0, rows)
        seen = None
        limits = (lengths - count)[:, None] + self.seen.reshape(-1, count)[documents[::count]]
        if (limits < longest).any():
            seen = torch.from_numpy(np.arange(longest) < limits[:, :, None]).to(q.device)[:, None]
        out = F.scaled_dot_product_attention(
            q.view(len(sequences), count, heads[0], -1).transpose(1, 2),
            keys.unflatten(2, (heads[1], -1)).transpose(1, 2),
            values.unflatten(2, (heads[2], -1)).transpose(1, 2),
            attn_mask=seen,
            enable_gqa=heads[0] != heads[1],
        )
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
