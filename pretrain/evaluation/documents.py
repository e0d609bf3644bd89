"""The held-out documents of an evaluation, as pure functions. This module imports no torch."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.loss_mask import is_target
from data_pipeline.shards.spans import Span, read_spans
from data_pipeline.shards.vectors import joined, within
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.stream.order import documents_at, key_of
from data_pipeline.stream.packing import cut, pack

ORDER_KEY = key_of(0)
"""Key of the pseudo-random order of held-out documents, which is the same for all runs and seeds."""
NO_RANGES = np.empty((0, 2), np.int64)
"""Masked ranges of a document without context."""


class Text(NamedTuple):
    """The slots of a document, or of a piece of one; slot i reads ids[i] and predicts ids[i + 1]."""

    ids: np.ndarray
    """Token ids, integer [slots + 1]."""
    weights: np.ndarray
    """Weights of the predictions, float32 [slots]; 1 where a prediction counts, else 0."""
    name: str
    """Name of the document: "shard/key"."""
    vectors: Mapping[str, np.ndarray] = {}
    """Vectors of the inputs ids[:-1] (data_pipeline/shards/vectors.py)."""
    number: int = 0
    """Place of the text in its evaluation, which decides the noise on its images."""


class Part(NamedTuple):
    """A part of a document."""

    ids: np.ndarray
    """Token ids, with the delimiters of the part."""
    vectors: Mapping[str, np.ndarray] = {}
    """Vectors of these ids."""

    def equals(self, other: "Part") -> bool:
        """Whether both parts hold the same content."""
        return np.array_equal(self.ids, other.ids) and all(
            np.array_equal(values, other.vectors[modality]) for modality, values in self.vectors.items()
        )


class _Parts(NamedTuple):
    """A part a and a part b of a document, and which ids of b are trained on."""

    condition: Part
    target: Part
    counted: np.ndarray


class Pair(NamedTuple):
    """A part b of a document (`target`), the nearest part a of this document, and a part a of another one."""

    condition: Part
    foreign: Part
    target: Part
    counted: np.ndarray
    """bool, by id of the target: whether it is trained on; False in context without loss."""
    name: str


def heldout_texts(source: TokenSource, *, num_sequences: int, context_tokens: int) -> list[Text]:
    """The first whole documents that pack into `num_sequences` sequences; fewer if there are no more.

    A document longer than the context is cut as in training.
    """
    texts: list[Text] = []
    ends: list[int] = []  # number of texts after each document
    room = num_sequences * context_tokens
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        pieces = _texts_of(source, document, context_tokens)
        room -= sum(len(text.weights) for text in pieces)
        if room < 0:
            break
        texts += pieces
        ends.append(len(texts))
    while ends and len(pack_texts(texts[: ends[-1]], context_tokens)) > num_sequences:
        ends.pop()
    return texts[: ends[-1]] if ends else []


def first_texts(source: TokenSource, *, num_documents: int, context_tokens: int) -> list[Text]:
    """The first `num_documents` documents, in the order of heldout_texts; fewer if there are no more.

    A document longer than the context is cut as in training.
    """
    texts: list[Text] = []
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        if num_documents == 0:
            break
        num_documents -= 1
        texts += _texts_of(source, document, context_tokens)
    return texts


def _texts_of(source: TokenSource, document: int, context_tokens: int) -> list[Text]:
    """A document, cut as in training."""
    content, name, masked = source.document(document), source.name(document), source.masked(document)
    return [
        Text(
            content.ids[start : start + slots + 1],
            is_target(masked, start, slots).astype(np.float32),
            name,
            within(content.vectors, content.ids, start, start + slots, source.vocabulary),
        )
        for start, slots in cut(len(content.ids) - 1, source.spans(document), context_tokens)
    ]


def pairs(
    source: TokenSource, *, num_documents: int, context_tokens: int
) -> dict[tuple[str, str], list[Pair]]:
    """By direction (a, b), up to `num_documents` pairs from the first documents that hold both modalities. A
    part b that is context without loss is no target.

    The foreign a comes from the next of these documents, cyclically, whose a differs and fits the context. A
    direction with fewer than two documents is left out.
    """
    vocabulary = source.vocabulary
    directions = list(permutations(vocabulary.modalities, 2))
    own: dict[tuple[str, str], list[tuple[_Parts, str]]] = {d: [] for d in directions}
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        unfinished = [d for d in directions if len(own[d]) < num_documents]
        if not unfinished:
            break
        if not len(source.spans(document)):
            continue
        content, masked, name = source.document(document), source.masked(document), source.name(document)
        for a, b in unfinished:
            parts = nearest_parts(content, vocabulary, a, b, masked)
            if parts is not None and len(parts.condition.ids) + len(parts.target.ids) + 1 <= context_tokens:
                own[a, b].append((parts, name))
    result = {direction: list(_with_foreign(own[direction], context_tokens)) for direction in directions}
    return {direction: pairs for direction, pairs in result.items() if pairs}


def fingerprint(texts: Sequence[Text], pairs_of: Mapping[tuple[str, str], Sequence[Pair]]) -> str:
    """64 bits in hex over all ids and vectors that an evaluation reads, in order, and which of the ids are no
    targets."""
    digest = hashlib.sha256()
    conditional = [
        part for listed in pairs_of.values() for p in listed for part in (p.condition, p.foreign, p.target)
    ]
    for part in (*texts, *conditional):
        digest.update(len(part.ids).to_bytes(8, "little") + part.ids.tobytes())
        for values in part.vectors.values():
            digest.update(len(values).to_bytes(8, "little") + values.tobytes())
    for text in texts:
        if not text.weights.all():
            digest.update(text.weights.tobytes())
    for counted in (pair.counted for listed in pairs_of.values() for pair in listed):
        if not counted.all():
            digest.update(counted.tobytes())
    return digest.hexdigest()[:16]


def nearest_parts(
    document: Document, vocabulary: Vocabulary, a: str, b: str, masked: np.ndarray = NO_RANGES
) -> _Parts | None:
    """The part of modality a and the part of modality b that are nearest to each other, with delimiters.

    `masked`: ranges of the document without loss; a part b within them is left out. None if the document
    lacks one of the modalities. Ties go to the first pair.
    """
    ids, vectors = document
    parts = read_spans(ids, vocabulary)
    counted = np.concatenate([[False], is_target(masked, 0, len(ids) - 1)])
    candidates = [
        (abs(i - j), i, j)
        for i, first in enumerate(parts)
        for j, second in enumerate(parts)
        if first.modality == a and second.modality == b and counted[second.start : second.end].any()
    ]
    if not candidates:
        return None
    _, i, j = min(candidates)

    def part(span: Span) -> Part:
        of_span = within(vectors, ids, span.start, span.end, vocabulary)
        return Part(ids[span.start : span.end], of_span)

    return _Parts(part(parts[i]), part(parts[j]), counted[parts[j].start : parts[j].end])


def _with_foreign(own: Sequence[tuple[_Parts, str]], context_tokens: int) -> Iterator[Pair]:
    """Pairs with a foreign condition, from the parts and names of documents."""
    for i, ((condition, target, counted), name) in enumerate(own):
        for (other, _, _), _ in (*own[i + 1 :], *own[:i]):
            if len(other.ids) + len(target.ids) + 1 <= context_tokens and not other.equals(condition):
                yield Pair(condition, other, target, counted, name)
                break


def pair_text(condition: Part, pair: Pair, vocabulary: Vocabulary) -> Text:
    """`<bos> condition target <eos>` of the pair's target. Only ids of the target that are trained on count,
    without its delimiters."""
    target = pair.target.ids
    ids = np.concatenate([[vocabulary.bos], condition.ids, target, [vocabulary.eos]]).astype(np.int64)
    weights = np.zeros(len(ids) - 1, np.float32)
    start = 1 + len(condition.ids)
    end = start + len(target)
    is_text = vocabulary.modality_of(target) == vocabulary.modalities.index(TEXT)
    inside = ~is_text if not is_text.all() else is_text
    weights[start - 1 : end - 1] = inside & pair.counted
    return Text(ids, weights, pair.name, joined([condition.vectors, pair.target.vectors], vocabulary))


def numbered(texts: Iterable[Text]) -> list[Text]:
    """The texts of one evaluation with their numbers, from 0."""
    return [text._replace(number=number) for number, text in enumerate(texts)]


def pack_texts(texts: Sequence[Text], context_tokens: int) -> list[list[Text]]:
    """The texts of every sequence, packed as in training."""
    if not texts:
        return []
    where = pack(np.array([len(text.weights) for text in texts]), context_tokens)
    sequences: list[list[Text]] = [[] for _ in range(int(where.max()) + 1)]
    for text, sequence in zip(texts, where.tolist(), strict=True):
        sequences[sequence].append(text)
    return sequences
