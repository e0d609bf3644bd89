"""Spans of a document: which stretches of its ids are an image, an utterance or another modality, or text."""

from typing import NamedTuple

import numpy as np

from data_pipeline.shards.vocabulary import TEXT, Vocabulary


class Span(NamedTuple):
    """A stretch ids[start:end] of one modality in a document. It includes the delimiters of its modality;
    <bos> and <eos> belong to no span.
    """

    modality: str
    start: int
    end: int


class Spans(NamedTuple):
    """All spans of modalities other than text in a stretch of ids, in order, with their delimiters."""

    start: np.ndarray
    """int64 [n]; position of the opening delimiter."""
    end: np.ndarray
    """int64 [n]; one past the closing delimiter."""
    modality: np.ndarray
    """uint8 [n]; index into the vocabulary's modalities."""


class SpanError(ValueError):
    """Ids that no tokenizer writes as a document; `position` is the index of the first wrong id."""

    def __init__(self, message: str, position: int) -> None:
        super().__init__(message)
        self.position = position


def find_spans(ids: np.ndarray, vocabulary: Vocabulary) -> Spans:
    """All spans of `ids` [n] other than text. `ids` may be one document or many documents in a row.

    Raises SpanError where an id is outside of the vocabulary, delimiters do not pair up, or an id of a
    modality stands outside of that modality's delimiters.
    """
    outside = np.flatnonzero(ids >= vocabulary.size)
    if len(outside):
        position = int(outside[0])
        raise SpanError(
            f"id {ids[position]} at position {position} is not in the vocabulary of {vocabulary.size} ids",
            position,
        )
    # signs[id] is +m where the id opens a span of modality m, -m where it closes one, else 0
    signs = np.zeros(vocabulary.size, np.int8)
    for index, modality in enumerate(vocabulary.modalities):
        if modality != TEXT:
            opening, closing = vocabulary.delimiters(modality)
            signs[opening], signs[closing] = index, -index
    positions = np.flatnonzero(signs[ids])
    opened, closed = signs[ids[positions[0::2]]], signs[ids[positions[1::2]]]
    start, end = positions[0::2], positions[1::2]
    unpaired = np.flatnonzero((opened[: len(closed)] <= 0) | (closed != -opened[: len(closed)]))
    if len(unpaired) or len(start) != len(end):
        position = int(positions[2 * unpaired[0]] if len(unpaired) else positions[-1])
        raise SpanError(f"delimiters of spans do not pair up at position {position}", position)
    _check_modalities(vocabulary, vocabulary.modality_of(ids), start, end, opened)
    return Spans(start, end + 1, opened.astype(np.uint8))


def _check_modalities(
    vocabulary: Vocabulary, modality: np.ndarray, start: np.ndarray, end: np.ndarray, opened: np.ndarray
) -> None:
    """Raise SpanError unless ids between delimiters have the modality `opened`, and all others are text."""
    changes = np.zeros(len(modality) + 1, np.int8)
    changes[start + 1] += opened
    changes[end] -= opened
    wrong = np.flatnonzero(np.cumsum(changes[:-1], dtype=np.int8) != modality)
    if len(wrong):
        position = int(wrong[0])
        name = vocabulary.modalities[modality[position]]
        raise SpanError(
            f"an id of {name} at position {position} stands where another modality belongs", position
        )


def read_spans(ids: np.ndarray, vocabulary: Vocabulary) -> tuple[Span, ...]:
    """The spans of one document `<bos> spans... <eos>`, text too, in order. Raises SpanError if `ids` is no
    document.
    """
    if len(ids) < 2 or ids[0] != vocabulary.bos or ids[-1] != vocabulary.eos:
        raise SpanError("a document starts with <bos> and ends with <eos>", 0)
    spans: list[Span] = []
    text_start = 1
    for start, end, modality in zip(*find_spans(ids, vocabulary), strict=True):
        if start > text_start:
            spans.append(Span(TEXT, text_start, int(start)))
        spans.append(Span(vocabulary.modalities[modality], int(start), int(end)))
        text_start = int(end)
    if len(ids) - 1 > text_start:
        spans.append(Span(TEXT, text_start, len(ids) - 1))
    return tuple(spans)
