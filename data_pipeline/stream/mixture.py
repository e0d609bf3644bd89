"""Each block of the stream takes an exact share of documents of every source, without a random draw."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

WeightsOf = Literal["documents", "tokens"]
"""What the weights of sources share out."""
_DIGITS = 12
"""Digits of a computed weight: powers of other machines differ in the last ones of a float."""
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


def document_weights(
    weights: Sequence[float],
    num_documents: Sequence[int],
    slots: Sequence[int],
    *,
    of: WeightsOf,
    temperature: float | None,
) -> list[float]:
    """Return weights by which documents are drawn, so that sources have the shares that were asked for.

    `weights` are shares of what `of` says, so by tokens a source of longer documents gives fewer of them.
    With a `temperature` T, a source of size n, in what `of` says, has n^(1/T) in the place of its weight: 1
    is in proportion to size, and more is closer to equal shares (Arivazhagan et al. 2019, arXiv 1907.05019).
    `slots`: those that the documents of each source fill; they count by tokens alone. Without a temperature,
    weights of documents are returned as they are; others keep 12 digits.
    """
    if of == "documents" and temperature is None:
        return list(weights)
    sizes = slots if of == "tokens" else num_documents
    asked = weights if temperature is None else [size ** (1 / temperature) for size in sizes]
    slots_each = [s / n if of == "tokens" else 1.0 for s, n in zip(slots, num_documents, strict=True)]
    drawn = [weight / each for weight, each in zip(asked, slots_each, strict=True)]
    return [float(f"{weight:.{_DIGITS}g}") for weight in drawn]


ORDER = 2
"""The order of training that new runs have. A run keeps the order that it began with.

1: blocks of one size, so that a block of several sources may hold the end of an epoch of a source and the
   beginning of the next, with some documents twice.
2: a block of several sources ends where an epoch of one of them ends. One source has the order of 1.
"""


@dataclass(frozen=True)
class Blocks:
    """Blocks end at these numbers of documents, drawn from all sources together."""

    shares: tuple[Fraction, ...]
    size: Fraction
    """A block ends at each multiple of so many documents; a mean where it is not whole."""
    epochs: tuple[int, ...]
    """A block also ends wherever source i has given a multiple of epochs[i] documents; () in order 1."""


def blocks_of(num_documents: Sequence[int], shares: Sequence[Fraction], order: int) -> Blocks:
    """Return the blocks of sources of `num_documents` drawn by `shares`, in ORDER or an earlier order.

    With one source, an epoch is a whole number of blocks. With several, no block holds a document of a source
    twice, unless the source gives all its documents within MIN_BLOCK_DOCUMENTS: such a source gives whole
    epochs between two ends of blocks, as few as take MIN_BLOCK_DOCUMENTS.
    """
    shares = tuple(shares)
    if len(num_documents) == 1:
        epoch = num_documents[0]
        return Blocks(shares, Fraction(epoch, math.ceil(epoch / BLOCK_DOCUMENTS)), ())
    if order == 1:
        once = min(n / share for n, share in zip(num_documents, shares, strict=True))
        most = min(BLOCK_DOCUMENTS, max(once, min(MIN_BLOCK_DOCUMENTS, sum(num_documents))))
        return Blocks(shares, _whole_periods(int(most), shares), ())
    epochs = tuple(
        n * math.ceil(MIN_BLOCK_DOCUMENTS * share / n) for n, share in zip(num_documents, shares, strict=True)
    )
    return Blocks(shares, _whole_periods(BLOCK_DOCUMENTS, shares), epochs)


def _whole_periods(most: int, shares: Sequence[Fraction]) -> Fraction:
    """At most `most` documents of which each source gives a whole number, where a block that small exists."""
    period = math.lcm(*(share.denominator for share in shares))
    return Fraction(max(1, most // period) * period if period <= BLOCK_DOCUMENTS else most)


def drawn_before(block: int, blocks: Blocks) -> tuple[int, ...]:
    """Documents of each source in blocks 0 ... block - 1: less than one document off the source's share."""
    drawn = block * blocks.size
    if blocks.epochs:  # Two ends may coincide; the block between them is empty.
        drawn = bisect_left(range(int(drawn)), block, key=lambda documents: _ended(documents, blocks))
    return tuple(math.floor(drawn * share) for share in blocks.shares)


def _ended(documents: int, blocks: Blocks) -> int:
    """Blocks that have ended when so many documents were drawn."""
    epochs = sum(
        documents * share.numerator // share.denominator // epoch
        for share, epoch in zip(blocks.shares, blocks.epochs, strict=True)
    )
    return documents // int(blocks.size) + epochs
