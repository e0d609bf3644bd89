"""Which held-out documents an evaluation reads, and as what: pure functions. Imports no torch."""

from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import BOS, EOS, TEXT, Vocabulary
from data_pipeline.stream.order import documents_at, key_of
from data_pipeline.stream.packing import cut, pack

ORDER_KEY = key_of(0)
"""Held-out documents are read in one pseudo-random order, the same for every run whatever its seed."""


class Text(NamedTuple):
    """Slots of a document, as an evaluation packs them: slot i reads ids[i] and predicts ids[i + 1]."""

    ids: np.ndarray
    """integer [slots + 1]."""
    weights: np.ndarray
    """float32 [slots]; 1 where the prediction counts."""
    name: str
    """ "shard/key" of the document that it comes from."""


class Pair(NamedTuple):
    """A part b of a document, the part a of the same document that is nearest to it, and a foreign a."""

    condition: np.ndarray
    foreign: np.ndarray
    target: np.ndarray
    name: str


def heldout_texts(source: TokenSource, *, num_sequences: int, context_tokens: int) -> list[Text]:
    """As many whole documents, in order, as pack into `num_sequences` sequences; fewer if there are no more.

    A document longer than the context is cut as in training.
    """
    texts: list[Text] = []
    ends: list[int] = []  # number of texts after each document
    room = num_sequences * context_tokens
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        ids, name = source.read(document), source.name(document)
        pieces = cut(len(ids) - 1, source.spans(document), context_tokens)
        room -= sum(slots for _, slots in pieces)
        if room < 0:
            break
        texts += [Text(ids[s : s + n + 1], np.ones(n, np.float32), name) for s, n in pieces]
        ends.append(len(texts))
    while ends and len(pack_texts(texts[: ends[-1]], context_tokens)) > num_sequences:
        ends.pop()
    return texts[: ends[-1]] if ends else []


def pairs(
    source: TokenSource, *, num_documents: int, context_tokens: int
) -> dict[tuple[str, str], list[Pair]]:
    """(a, b) -> up to `num_documents` pairs from the first documents, in order, that hold both modalities.

    The foreign a is the next such document's, in a circle, that differs and fits. A direction for which there
    are no two documents is left out.
    """
    vocabulary = source.vocabulary
    directions = list(permutations(vocabulary.modalities, 2))
    found: dict[tuple[str, str], list[tuple[np.ndarray, np.ndarray, str]]] = {d: [] for d in directions}
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        wanting = [d for d in directions if len(found[d]) < num_documents]
        if not wanting:
            break
        if not len(source.spans(document)):
            continue
        ids, name = source.read(document), source.name(document)
        for a, b in wanting:
            pair = nearest_parts(ids, vocabulary, a, b)
            if pair is not None and len(pair[0]) + len(pair[1]) + 1 <= context_tokens:
                found[a, b].append((*pair, name))
    result = {direction: list(_with_foreign(found[direction], context_tokens)) for direction in directions}
    return {direction: listed for direction, listed in result.items() if listed}


def nearest_parts(
    ids: np.ndarray, vocabulary: Vocabulary, a: str, b: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """The part of modality a and the part of modality b that are nearest to each other; None without both.

    Of equally near pairs the first. Parts keep their delimiters.
    """
    parts = read_spans(ids, vocabulary)
    candidates = [
        (abs(i - j), i, j)
        for i, first in enumerate(parts)
        for j, second in enumerate(parts)
        if first.modality == a and second.modality == b
    ]
    if not candidates:
        return None
    _, i, j = min(candidates)
    return ids[parts[i].start : parts[i].end], ids[parts[j].start : parts[j].end]


def _with_foreign(found: Sequence[tuple[np.ndarray, np.ndarray, str]], context_tokens: int) -> Iterator[Pair]:
    for i, (condition, target, name) in enumerate(found):
        for other, _, _ in (*found[i + 1 :], *found[:i]):
            if len(other) + len(target) + 1 <= context_tokens and not np.array_equal(other, condition):
                yield Pair(condition, other, target, name)
                break


def pair_text(condition: np.ndarray, target: np.ndarray, name: str, vocabulary: Vocabulary) -> Text:
    """`<bos> condition target <eos>` in which only the target's own ids count: no delimiters, no <eos>."""
    ids = np.concatenate([[BOS], condition, target, [EOS]]).astype(np.int64)
    weights = np.zeros(len(ids) - 1, np.float32)
    start, end = 1 + len(condition), 1 + len(condition) + len(target)
    is_text = vocabulary.modality_of(target) == vocabulary.modalities.index(TEXT)
    inside = ~is_text if not is_text.all() else is_text
    weights[start - 1 : end - 1] = inside
    return Text(ids, weights, name)


def pack_texts(texts: Sequence[Text], context_tokens: int) -> list[list[Text]]:
    """Sequences of texts, by the packing that training uses."""
    if not texts:
        return []
    where = pack(np.array([len(text.weights) for text in texts]), context_tokens)
    sequences: list[list[Text]] = [[] for _ in range(int(where.max()) + 1)]
    for text, sequence in zip(texts, where.tolist(), strict=True):
        sequences[sequence].append(text)
    return sequences
