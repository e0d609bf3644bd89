"""The parts of a document: which stretch of its ids is an image, an utterance, or text."""

from typing import NamedTuple

import numpy as np

from data_pipeline.shards.vocabulary import BOS, DELIMITERS, EOS, TEXT, Vocabulary


class Span(NamedTuple):
    """ids[start:end] of a document; an image's or utterance's delimiters are in it, <bos> and <eos> in
    none.
    """

    modality: str
    start: int
    end: int


class Spans(NamedTuple):
    """Images and utterances in a run of ids, in order; delimiters included."""

    start: np.ndarray
    """int64 [n]; position of the opening delimiter."""
    end: np.ndarray
    """int64 [n]; one past the closing delimiter."""
    modality: np.ndarray
    """uint8 [n]; index into the vocabulary's modalities."""


class PartsError(ValueError):
    """Ids that are no document; `position` is where reading stopped."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def find_spans(ids: np.ndarray, vocabulary: Vocabulary) -> Spans:
    """All image and speech spans of `ids` [n], which may be one document or many in a row.

    Raises PartsError where an id is outside of the vocabulary, delimiters do not pair up, or an id of a
    modality stands outside of that modality's delimiters.
    """
    outside = np.flatnonzero(ids >= vocabulary.size)
    if len(outside):
        at = int(outside[0])
        raise PartsError(
            f"id {ids[at]} at position {at} is not in the vocabulary of {vocabulary.size} ids", at
        )
    # +m opens a span of modality m, -m closes it
    marks = np.zeros(vocabulary.size, np.int8)
    for modality, (opening, closing) in DELIMITERS.items():
        if modality in vocabulary.sizes:
            marks[opening] = vocabulary.modalities.index(modality)
            marks[closing] = -marks[opening]
    at = np.flatnonzero(marks[ids])
    kind = marks[ids[at]]
    start, end = at[0::2], at[1::2]
    paired = len(start) == len(end)
    odd = np.flatnonzero((kind[0::2][: len(end)] <= 0) | (kind[1::2] != -kind[0::2][: len(end)]))
    if len(odd) or not paired:
        position = int(at[2 * odd[0]] if len(odd) else at[-1])
        raise PartsError(
            f"delimiters of images and utterances do not pair up at position {position}", position
        )
    modality = kind[0::2].astype(np.uint8)
    found = vocabulary.modality_of(ids)
    edges = np.zeros(len(ids) + 1, np.int8)
    edges[start + 1] += kind[0::2]
    edges[end] -= kind[0::2]
    wrong = np.flatnonzero(np.cumsum(edges[:-1], dtype=np.int8) != found)
    if len(wrong):
        position = int(wrong[0])
        name = vocabulary.modalities[found[position]]
        raise PartsError(
            f"a {name} id at position {position} stands where another modality belongs", position
        )
    return Spans(start, end + 1, modality)


def read_spans(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[Span, ...]:
    """The parts of one document `<bos> parts... <eos>`, in order. Raises PartsError if it is none."""
    if len(ids) < 2 or ids[0] != BOS or ids[-1] != EOS:
        raise PartsError("a document starts with <bos> and ends with <eos>", 0)
    parts: list[Span] = []
    last = 1
    for start, end, modality in zip(*find_spans(ids, vocabulary), strict=True):
        if start > last:
            parts.append(Span(TEXT, last, int(start)))
        parts.append(Span(vocabulary.modalities[modality], int(start), int(end)))
        last = int(end)
    if len(ids) - 1 > last:
        parts.append(Span(TEXT, last, len(ids) - 1))
    return tuple(parts)
