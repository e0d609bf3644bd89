"""Documents -> pieces that fit a sequence -> sequences; from lengths alone, before anything is read.

Lengths here are slots: a document of n ids fills n - 1 (each slot predicts the next id). A piece of a
document is slots [start, start + slots), that is inputs ids[start : start + slots] and targets ids[start + 1
: start + slots + 1], so the pieces of a document predict each of its ids once.
"""

from collections import defaultdict

import numpy as np


def spans_fit(spans: np.ndarray, context_tokens: int) -> bool:
    """Whether every span of a document, such as an image (int [n, 2]: start, end), fits a sequence."""
    return len(spans) == 0 or int((spans[:, 1] - spans[:, 0]).max()) <= context_tokens


def cut(num_slots: int, spans: np.ndarray, context_tokens: int) -> list[tuple[int, int]]:
    """(start, slots) of the pieces of a document of `num_slots` slots; a pure function of its arguments.

    A document that fits stays whole. Otherwise a piece takes as much as fits and ends at the last border of a
    span, such as an image, in the second half of that stretch; without such a border it ends inside text. No
    piece ends inside a span: all of a span is input of one piece. `spans`: int64 [n, 2], start and end of
    spans other than text in the document, ascending. Returns [] for a document with a span that no sequence
    holds.
    """
    if num_slots <= context_tokens:
        return [(0, num_slots)]
    if not spans_fit(spans, context_tokens):
        return []
    pieces, start = [], 0
    starts, ends = spans[:, 0], spans[:, 1]
    while num_slots - start > context_tokens:
        limit = start + context_tokens
        borders = spans[(spans >= start + context_tokens // 2 + 1) & (spans <= limit)]
        last_begun = int(np.searchsorted(starts, limit, side="left")) - 1  # span that starts before limit
        if len(borders):
            end = int(borders.max())
        elif last_begun >= 0 and limit < ends[last_begun]:
            end = int(starts[last_begun])
        else:
            end = limit
        pieces.append((start, end - start))
        start = end
    pieces.append((start, num_slots - start))
    return pieces


def pack(slots: np.ndarray, capacity: int) -> np.ndarray:
    """Sequence of each piece, int64 [n], numbered from 0: best fit, longest piece first, equals in order.

    `slots`: int [n], slots of each piece, from 1 to `capacity`. Source of the method: Ding et al., "Fewer
    Truncations Improve Language Modeling" (ICML 2024, arXiv 2404.10830), section 3. The search for the
    fullest sequence that still has room is one shift of an integer whose bit r says that a sequence with r
    free slots is open.
    """
    sequence_of = [0] * len(slots)
    open_with: defaultdict[int, list[int]] = defaultdict(list)
    open_bits = 0
    opened = 0
    lengths = slots.tolist()
    for i in np.argsort(-slots, kind="stable").tolist():
        need = lengths[i]
        fitting = open_bits >> need
        if fitting:
            free = need + (fitting & -fitting).bit_length() - 1
            sequence = open_with[free].pop()
            if not open_with[free]:
                open_bits ^= 1 << free
        else:
            sequence, free = opened, capacity
            opened += 1
        sequence_of[i] = sequence
        free -= need
        if free:
            open_with[free].append(sequence)
            open_bits |= 1 << free
    return np.array(sequence_of, np.int64)
