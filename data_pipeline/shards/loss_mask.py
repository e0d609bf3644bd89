"""Ids of a document are targets, but for those of parts with "loss": false, which are context only.

A document has masked ranges [start, end) of its ids, ascending and apart. The model reads an id in one of
them and is not trained to predict it. A part that is context is masked whole, with its delimiters; <eos> is
always a target. In a token shard the ranges of a document stand behind its ids, as a member KEY.masked of
little-endian uint32 pairs; a document without such ranges has no such member.
"""

from collections.abc import Sequence

import numpy as np

MASKED_SUFFIX = "masked"
_DTYPE = np.dtype("<u4")


def masked_ranges(lengths: Sequence[int], loss: Sequence[bool]) -> np.ndarray:
    """int64 [n, 2]; masked ranges of a document `<bos> parts <eos>`, whose part i has lengths[i] ids that are
    targets where loss[i] is True."""
    ranges: list[tuple[int, int]] = []
    position = 1
    for length, is_target in zip(lengths, loss, strict=True):
        start, position = position, position + length
        if is_target or not length:
            continue
        if ranges and ranges[-1][1] == start:
            start = ranges.pop()[0]
        ranges.append((start, position))
    return np.array(ranges, np.int64).reshape(-1, 2)


def to_bytes(ranges: np.ndarray) -> bytes:
    """The content of the member KEY.masked."""
    return ranges.astype(_DTYPE).tobytes()


def from_bytes(content: bytes, num_ids: int) -> np.ndarray:
    """int64 [n, 2]; the masked ranges of a document of `num_ids` ids. Raises ValueError for other content."""
    if not content or len(content) % (2 * _DTYPE.itemsize):
        raise ValueError(f"{len(content)} bytes are no pairs of uint32")
    ranges = np.frombuffer(content, _DTYPE).astype(np.int64)
    if ranges[0] < 1 or ranges[-1] >= num_ids or (np.diff(ranges) <= 0).any():
        raise ValueError(f"ranges {ranges.reshape(-1, 2).tolist()[:4]} do not ascend within {num_ids} ids")
    return ranges.reshape(-1, 2)


def is_target(ranges: np.ndarray, start: int, slots: int) -> np.ndarray:
    """bool [slots]; whether the slots start, start + 1, ... of a document count, where slot i predicts id
    i + 1. This function alone decides which targets count."""
    counted = np.ones(slots, bool)
    for first, last in ranges:
        counted[max(0, first - 1 - start) : max(0, last - 1 - start)] = False
    return counted
