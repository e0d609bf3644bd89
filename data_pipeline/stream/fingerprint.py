"""The fingerprint of training data: 64 bits, chained over all that was read, in global order.

    document    crc32 of the bytes that were read, or UNREADABLE: its content
      v         content * weight of the piece, from its place in its document and in its sequence
    sequence    sum over its pieces
      v         sum * factor^(sequences after it in the step), over all ranks' sequences
    step        the digest
      v         fingerprint * factor^(sequences of the step) + digest
    run         the fingerprint

All arithmetic is modulo 2^64, where weights and factor are odd: a document that was read otherwise always
changes the digest of its step. Everything is a sum, so the fingerprint depends neither on the number of ranks
nor on the number of sequences in a step.
"""

import numpy as np

from data_pipeline.stream.order import mix

UNREADABLE = 1 << 32
"""The content, which no crc32 equals, of a document whose bytes were not those indexed: padding stands in its
place."""
_FACTOR = 0xD1342543DE82EF95
_WORD = 1 << 64


def piece_weights(start: np.ndarray, slots: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The weight of each piece's content, uint64 [P]: pseudo-random odd numbers.

    `start`, `slots`, `place`: int64 [P]; first slot in its document, number of slots, number in its sequence.
    """
    in_document = mix(start.astype(np.uint64) | slots.astype(np.uint64) << np.uint64(32))
    return mix(in_document + place.astype(np.uint64)) | np.uint64(1)


def sequence_weights(num_sequences: int) -> np.ndarray:
    """The weight of each sequence in a step of `num_sequences`, uint64: powers of the factor, down to 1."""
    factors = np.full(num_sequences, _FACTOR, np.uint64)
    factors[0] = 1
    return np.cumprod(factors, dtype=np.uint64)[::-1]


def step_digest(
    contents: np.ndarray, of_pieces: np.ndarray, of_sequences: np.ndarray, num_pieces: np.ndarray
) -> int:
    """The part of a rank in the digest of a step; the digest is the sum of all ranks' parts modulo 2^64.

    `contents`: uint64 [P], of the rank's pieces; `of_pieces`, `of_sequences`: weights of these pieces and of
    the rank's sequences; `num_pieces`: pieces of each of the sequences.
    """
    return int(np.dot(contents, of_pieces * np.repeat(of_sequences, num_pieces)))


def chain(fingerprint: int, digest: int, num_sequences: int) -> int:
    """The fingerprint after a step of `num_sequences` sequences with `digest`."""
    return (fingerprint * pow(_FACTOR, num_sequences, _WORD) + digest) % _WORD
