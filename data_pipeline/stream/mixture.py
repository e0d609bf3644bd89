"""How many documents of each source a block of the stream takes: exact shares, no random draw."""

import math
from collections.abc import Sequence
from fractions import Fraction

BLOCK_DOCUMENTS = 4000
"""At most so many documents are packed together. About a thousand are enough to fill 99.9 % of the slots."""
MIN_BLOCK_DOCUMENTS = 256
"""Packing fewer documents wastes slots, so a source smaller than its share of them repeats inside a block."""


def shares(weights: Sequence[float]) -> tuple[Fraction, ...]:
    """Weights as exact shares that sum to 1. A weight counts by its decimal digits: 0.35 is 7/20."""
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(f"weight {weight}: a source's weight is a number above 0")
    exact = [Fraction(repr(float(weight))) for weight in weights]
    return tuple(weight / sum(exact) for weight in exact)


def block_documents(num_documents: Sequence[int], shares: Sequence[Fraction]) -> Fraction:
    """Return the number of documents in a block, for sources of `num_documents` drawn by `shares`.

    The number is a mean where it is not whole. It is at most BLOCK_DOCUMENTS, and no more than keeps every
    source from being repeated inside a block (unless that is below MIN_BLOCK_DOCUMENTS). With one source, an
    epoch is a whole number of blocks. With several, a block holds a whole number of documents of each source,
    wherever a block that small exists.
    """
    if len(num_documents) == 1:
        epoch = num_documents[0]
        return Fraction(epoch, math.ceil(epoch / BLOCK_DOCUMENTS))
    once = min(n / share for n, share in zip(num_documents, shares, strict=True))
    target = min(BLOCK_DOCUMENTS, max(once, min(MIN_BLOCK_DOCUMENTS, sum(num_documents))))
    period = math.lcm(*(share.denominator for share in shares))
    return Fraction(max(1, int(target // period)) * period if period <= BLOCK_DOCUMENTS else int(target))


def drawn_before(block: int, block_documents: Fraction, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """Documents of each source in blocks 0 ... block - 1: less than one document off the source's share."""
    return tuple(math.floor(block * block_documents * share) for share in shares)
