"""The fingerprint of training data: 64 bits, chained over all sequences that were read, in global order.

    document    crc32 of the bytes that were read, or UNREADABLE
      v         with the place of each piece in its document and in its sequence
    sequence    a hash                                                  sequence_hashes
      v         sum of hash * factor^(sequences after it in the step), over all ranks' sequences
    step        a digest                                                step_digest
      v         fingerprint * factor^(sequences of the step) + digest
    run         the fingerprint                                         chain

All arithmetic is modulo 2^64. The chain is linear in the hashes, so the digest of a step is a sum over ranks,
and the fingerprint depends neither on the number of ranks nor on the number of sequences in a step.
"""

import numpy as np

from data_pipeline.stream.order import mix
from data_pipeline.stream.stream import BlockPlan

UNREADABLE = 1 << 63
"""Stands for the crc32 of a document whose bytes were not those indexed: padding stands in its place."""
_FACTOR = 0xD1342543DE82EF95  # odd, so a multiplication by it loses nothing modulo 2^64
_WORD = 1 << 64


def sequence_hashes(plan: BlockPlan, contents: np.ndarray) -> np.ndarray:
    """The hash of each sequence of a plan, uint64 [sequences].

    `contents`: uint64 [P], for each piece the crc32 of its document's bytes as they were read, or UNREADABLE.
    """
    place = np.arange(1, len(contents) + 1) - np.repeat(plan.first[:-1], np.diff(plan.first))
    content = mix(contents | plan.slots.astype(np.uint64) << np.uint64(32))
    pieces = mix(content + mix(plan.start.astype(np.uint64)) + mix(place.astype(np.uint64) << np.uint64(32)))
    return mix(np.add.reduceat(pieces, plan.first[:-1]))


def step_weights(num_sequences: int) -> np.ndarray:
    """The weight of each sequence's hash in the digest of a step of `num_sequences`, uint64."""
    factors = np.full(num_sequences, _FACTOR, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)[::-1]


def step_digest(hashes: np.ndarray, weights: np.ndarray) -> int:
    """The part of a rank in the digest of a step; the digest is the sum of all ranks' parts modulo 2^64.

    `hashes`, `weights`: uint64, of the rank's sequences alone.
    """
    return int((hashes * weights).sum(dtype=np.uint64))


def chain(fingerprint: int, digest: int, num_sequences: int) -> int:
    """The fingerprint after a step of `num_sequences` sequences with `digest`."""
    return (fingerprint * pow(_FACTOR, num_sequences, _WORD) + digest) % _WORD
