"""The training data as one stream of packed sequences, the same for any number of ranks.

    documents     lengths and spans of every document, from the index         data_pipeline/shards/index.py
      v           exact share of each source in each block                    mixture.py
    order         which documents a block takes: a keyed permutation          order.py
      v
    blocks        up to BLOCK_DOCUMENTS documents, packed together
      v           long documents cut between images, best fit                 packing.py
    sequences     lists of pieces, shuffled, numbered over all blocks         BlockPlan, here
      v           step: the next G sequences; rank r of D takes r, r + D, ...
    batches       pieces read, checked and laid out in slots                  loader.py, batch.py
      v
    fingerprint   a hash chained over all that was read                       fingerprint.py

Everything before the batches is computed from the index, before a document is read. StreamState is a position
in the stream.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ChangedIndex, ForeignTokenizer, SpanTooLong
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.fingerprint import piece_weights
from data_pipeline.stream.mixture import ORDER, WeightsOf, blocks_of, document_weights, drawn_before, shares
from data_pipeline.stream.order import documents_at, key_of, permute
from data_pipeline.stream.packing import cut, pack

_STATE_FORMAT = 3
_KEPT_BLOCKS = 4  # two neighbours for the thread that reads, and two for the one that fetches ahead


@dataclass(frozen=True)
class BlockPlan:
    """Which pieces of which documents make up each of some sequences. P pieces in all."""

    source: np.ndarray
    """uint16 [P]"""
    document: np.ndarray
    """int64 [P]; number within its source."""
    start: np.ndarray
    """int64 [P]; first slot of the piece within its document."""
    slots: np.ndarray
    """int64 [P]; slots that the piece fills."""
    first: np.ndarray
    """int64 [sequences + 1]; first piece of each sequence, then P."""
    weight: np.ndarray
    """uint64 [P]; weight of the piece in the fingerprint (fingerprint.py)."""

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def filled_slots(self) -> int:
        return int(self.slots.sum())

    def take(self, positions: np.ndarray) -> "BlockPlan":
        """The sequences at `positions` (int [n]), in that order."""
        counts = self.first[positions + 1] - self.first[positions]
        first = np.concatenate([[0], np.cumsum(counts)])
        piece = np.repeat(self.first[positions] - first[:-1], counts) + np.arange(first[-1])
        return BlockPlan(
            self.source[piece],
            self.document[piece],
            self.start[piece],
            self.slots[piece],
            first,
            self.weight[piece],
        )

    @staticmethod
    def join(plans: Sequence["BlockPlan"]) -> "BlockPlan":
        """Sequences of several plans, one after another."""
        if len(plans) == 1:
            return plans[0]
        before = np.cumsum([0, *(len(plan.slots) for plan in plans)])
        return BlockPlan(
            np.concatenate([plan.source for plan in plans]),
            np.concatenate([plan.document for plan in plans]),
            np.concatenate([plan.start for plan in plans]),
            np.concatenate([plan.slots for plan in plans]),
            np.concatenate([[0], *(plan.first[1:] + n for plan, n in zip(plans, before, strict=False))]),
            np.concatenate([plan.weight for plan in plans]),
        )


@dataclass(frozen=True)
class StreamState:
    """A place in the stream: what comes next. The same on all ranks."""

    block: int
    sequence: int
    """Next sequence, within the block."""
    sequences: int
    """Consumed since the start."""
    seed: int
    context_tokens: int
    sources: tuple[tuple[str, str], ...]
    """(index hash, share) of each source: what the numbers above refer to."""
    order: int = ORDER
    """The order that the run began with (mixture.py)."""

    def to_json(self) -> str:
        return json.dumps({"format": _STATE_FORMAT, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> "StreamState":
        """Raises ConfigError for anything but the output of to_json of this version or of formats 1 and 2."""
        try:
            values = json.loads(text)
            if (number := values.pop("format")) in (1, 2):  # all streams had order 1 then
                values["order"] = 1
            if number == 1:  # it had the fingerprint, which TrainState has now
                del values["fingerprint"]
            if number not in (1, 2, _STATE_FORMAT) or values["order"] not in range(1, ORDER + 1):
                raise ValueError("another format")
            values["sources"] = tuple((str(index), str(share)) for index, share in values["sources"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"not a stream state of format {_STATE_FORMAT}: {error!r}") from None


@dataclass(frozen=True)
class _Block:
    plan: BlockPlan
    begun: np.ndarray
    """int64 [sequences + 1, sources]; documents whose first piece lies before each sequence."""


class Stream:
    """Plans the sequences of every step. Holds no position: that is the caller's StreamState."""

    def __init__(
        self,
        sources: Sequence[tuple[TokenSource, float]],
        *,
        seed: int,
        context_tokens: int,
        sequences_per_step: int,
        max_too_long_frac: float = 0.01,
        weights_of: WeightsOf = "documents",
        temperature: float | None = None,
    ) -> None:
        """`sources`: (source, weight); `weights_of`, `temperature`: see document_weights (mixture.py).

        Raises ForeignTokenizer if sources were tokenized differently, SpanTooLong if more than
        `max_too_long_frac` of the documents of a source, or all, have a span (an image ...) longer than the
        context.
        """
        if not sources or context_tokens < 1 or sequences_per_step < 1:
            raise ConfigError("a stream needs a source, context_tokens >= 1 and sequences_per_step >= 1")
        self.sources = tuple(source for source, _ in sources)
        self.seed, self.context_tokens, self.sequences_per_step = seed, context_tokens, sequences_per_step
        _check_tokenizers(self.sources)
        self.vocabulary = self.sources[0].vocabulary
        self.too_long = tuple(_too_long(source, context_tokens, max_too_long_frac) for source in self.sources)
        """Per source, documents that are left out: a span in them (an image, an utterance ...) is longer than
        the context.
        """
        num_documents = [source.num_documents for source in self.sources]
        slots = self._slots() if weights_of == "tokens" else num_documents
        weights = [weight for _, weight in sources]
        self.shares = shares(
            document_weights(weights, num_documents, slots, of=weights_of, temperature=temperature)
        )
        """Of the documents drawn, per source; they sum to 1."""
        self._blocks = {order: blocks_of(num_documents, self.shares, order) for order in range(1, ORDER + 1)}
        self._keys = [key_of(seed, 1, i) for i in range(len(self.sources))]
        self._identity = tuple(
            (source.index_hash, str(share)) for source, share in zip(self.sources, self.shares, strict=True)
        )
        self._block = lru_cache(_KEPT_BLOCKS)(self._plan_block)

    @property
    def num_documents(self) -> int:
        """Documents of all sources."""
        return sum(source.num_documents for source in self.sources)

    def _slots(self) -> list[int]:
        """Slots that all documents of each source fill, without those that are left out."""
        return [
            int(source.lengths.sum(dtype=np.int64))
            - int(source.lengths[too_long].sum(dtype=np.int64))
            - (source.num_documents - len(too_long))
            for source, too_long in zip(self.sources, self.too_long, strict=True)
        ]

    @property
    def num_too_long(self) -> int:
        """Documents of all sources that are left out."""
        return sum(map(len, self.too_long))

    def start(self) -> StreamState:
        """The state before the first sequence."""
        return StreamState(0, 0, 0, self.seed, self.context_tokens, self._identity)

    def check(self, state: StreamState) -> None:
        """Raises ConfigError (ChangedIndex for changed shards) if `state` is a place in another stream."""
        for name, ours in (("seed", self.seed), ("context_tokens", self.context_tokens)):
            if getattr(state, name) != ours:
                raise ConfigError(
                    f"{name} = {ours}, but the saved stream has {name} = {getattr(state, name)}; "
                    f"set it back, or start a new run"
                )
        if len(state.sources) != len(self.sources):
            raise ConfigError(
                f"{len(self.sources)} sources, but the saved stream has {len(state.sources)}; a run goes on "
                f"with the sources it began with"
            )
        for source, theirs, ours in zip(self.sources, state.sources, self._identity, strict=True):
            if theirs[0] != ours[0]:
                raise ChangedIndex(
                    f"{source.folder}: its index is {ours[0][:12]}, but the saved stream was made with "
                    f"{theirs[0][:12]}: the shards have changed since; restore them, or start a new run"
                )
            if theirs[1] != ours[1]:
                raise ConfigError(
                    f"{source.folder}: share of the documents {ours[1]}, but {theirs[1]} in the saved "
                    f"stream; set the weights back, or start a new run"
                )

    def plan_step(self, state: StreamState) -> tuple[BlockPlan, StreamState]:
        """The next `sequences_per_step` sequences in global order, and the state after them."""
        self.check(state)
        parts: list[BlockPlan] = []
        missing = self.sequences_per_step
        while missing:
            block = self._block(state.order, state.block)
            first, last = state.sequence, min(state.sequence + missing, len(block.plan))
            parts.append(block.plan.take(np.arange(first, last)))
            missing -= last - first
            at_end = last == len(block.plan)
            state = replace(
                state,
                block=state.block + at_end,
                sequence=0 if at_end else last,
                sequences=state.sequences + last - first,
            )
        return BlockPlan.join(parts), state

    def epochs(self, state: StreamState) -> tuple[float, ...]:
        """Passes over each source so far: documents begun / documents that it has."""
        before = drawn_before(state.block, self._blocks[state.order])
        begun = self._block(state.order, state.block).begun[state.sequence]
        return tuple(
            (drawn + int(now)) / source.num_documents
            for drawn, now, source in zip(before, begun, self.sources, strict=True)
        )

    def expected_epochs(self, num_sequences: int) -> tuple[float, ...]:
        """Passes over each source in `num_sequences` full sequences, from the mean length of documents."""
        per_document = sum(
            float(share) * n / source.num_documents
            for source, share, n in zip(self.sources, self.shares, self._slots(), strict=True)
        )
        drawn = num_sequences * self.context_tokens / per_document
        return tuple(
            drawn * float(share) / source.num_documents
            for source, share in zip(self.sources, self.shares, strict=True)
        )

    def _plan_block(self, order: int, block: int) -> _Block:
        source, document, slots = self._draw(order, block)
        pieces = np.ones(len(document), np.int64)
        start = np.zeros(len(document), np.int64)
        long = np.flatnonzero(slots > self.context_tokens)
        if len(long):
            cuts = [
                cut(int(slots[i]), self.sources[source[i]].spans(int(document[i])), self.context_tokens)
                for i in long
            ]
            pieces[long] = [len(found) for found in cuts]
            of = np.repeat(np.arange(len(document)), pieces)
            source, document, slots, start = (a[of] for a in (source, document, slots, start))
            was_cut = np.isin(of, long)
            flat = np.array([piece for found in cuts for piece in found], np.int64).reshape(-1, 2)
            start[was_cut], slots[was_cut] = flat[:, 0], flat[:, 1]
        if not len(slots):
            return _Block(
                BlockPlan(source, document, start, slots, np.zeros(1, np.int64), np.zeros(0, np.uint64)),
                np.zeros((1, len(self.sources)), np.int64),
            )
        # shuffled before packing: pieces of one length, and those within a sequence, come in random order
        at = permute(np.arange(len(slots)), len(slots), key_of(self.seed, 2, block))
        sequence = pack(slots[at], self.context_tokens)
        count = int(sequence.max()) + 1
        sequence = permute(np.arange(count), count, key_of(self.seed, 3, block))[sequence]
        by_sequence = np.argsort(sequence, kind="stable")
        at, sequence = at[by_sequence], sequence[by_sequence]
        first = np.searchsorted(sequence, np.arange(count + 1))
        start, slots = start[at], slots[at]
        weight = piece_weights(start, slots, np.arange(len(at)) - first[sequence])
        plan = BlockPlan(source[at], document[at], start, slots, first, weight)
        begun = np.zeros((count + 1, len(self.sources)), np.int64)
        np.add.at(begun, (sequence + 1, plan.source), plan.start == 0)
        return _Block(plan, np.cumsum(begun, axis=0))

    def _draw(self, order: int, block: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(source, document, slots) of the documents of a block."""
        before, after = (drawn_before(number, self._blocks[order]) for number in (block, block + 1))
        drawn = [
            documents_at(a, b - a, source.num_documents, key)
            for a, b, source, key in zip(before, after, self.sources, self._keys, strict=True)
        ]
        counts = [len(documents) for documents in drawn]
        pairs = list(zip(self.sources, drawn, strict=True))
        return (
            np.repeat(np.arange(len(drawn), dtype=np.uint16), counts),
            np.concatenate(drawn),
            np.concatenate([source.lengths[documents].astype(np.int64) for source, documents in pairs]) - 1,
        )


def _check_tokenizers(sources: Sequence[TokenSource]) -> None:
    ours = sources[0]
    for theirs in sources[1:]:
        if (text := _vocabulary_text(theirs)) != _vocabulary_text(ours):
            raise ForeignTokenizer(
                f"{theirs.folder}: vocabulary {text}, but {ours.folder} has {_vocabulary_text(ours)}; "
                f"tokenize both with the same tokenizers"
            )
        for modality, fingerprint in ours.fingerprints.items():
            if theirs.fingerprints.get(modality) != fingerprint:
                raise ForeignTokenizer(
                    f"{theirs.folder}: {modality} tokenizer {theirs.fingerprints.get(modality)}, but "
                    f"{ours.folder} has {fingerprint}; the same ids mean different things: tokenize both "
                    f"with the same tokenizers"
                )


def _vocabulary_text(source: TokenSource) -> str:
    """The numbers of ids, in their order, and the formats of vectors."""
    formats = {modality: dict(of) for modality, of in source.vocabulary.vectors.items()}
    return f"{source.vocabulary.sizes}" + (f" with vectors {formats}" if formats else "")


def _too_long(source: TokenSource, context_tokens: int, max_frac: float) -> np.ndarray:
    """Documents of a source with a span longer than the context; int64, ascending."""
    if source.num_documents == 0:
        raise ConfigError(f"{source.folder}: holds no documents")
    if source.longest_span_tokens <= context_tokens:
        return np.zeros(0, np.int64)
    span = source.index.span
    rows = np.flatnonzero(span[:, 1] - span[:, 0] > context_tokens)
    documents = np.unique(np.searchsorted(source.index.span_first, rows, side="right") - 1)
    none_left = len(documents) == source.num_documents
    if none_left or len(documents) > max_frac * source.num_documents:
        first = source.name(int(documents[0]))
        remedy = "raise it" if none_left else "raise it, or data.max_too_long_frac to leave them out"
        raise SpanTooLong(
            f"{source.folder}: {len(documents)} of {source.num_documents} documents hold a span (an "
            f"image, an utterance ...) longer than context_tokens = {context_tokens}; {remedy}: the longest "
            f'takes {source.longest_span_tokens} tokens with its delimiters, the first is in "{first}"'
        )
    return documents
