"""The vectors of a document, which travel beside its ids.

A document holds the code of a modality of vectors wherever a vector stands. Its vectors are a mapping:
modality -> [n, features] in the modality's storage dtype, in the order of the codes, for every modality of
vectors in the vocabulary. In a token shard they stand behind the ids (and behind KEY.masked) as a member
KEY.vectors: one modality after another, in the vocabulary's order. A document without vectors has no such
member.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.shards.vocabulary import Vocabulary

VECTORS_SUFFIX = "vectors"


def num_vectors(ids: np.ndarray, vocabulary: Vocabulary) -> dict[str, int]:
    """Modality of vectors -> number of its vectors among `ids`."""
    return {m: int(np.count_nonzero(ids == vocabulary.first_code(m))) for m in vocabulary.vectors}


def num_bytes(ids: np.ndarray, vocabulary: Vocabulary) -> int:
    """The size of the member KEY.vectors of a document; 0: it has none."""
    return _bytes_of(num_vectors(ids, vocabulary), vocabulary)


def _bytes_of(counts: Mapping[str, int], vocabulary: Vocabulary) -> int:
    return sum(n * vocabulary.vectors[modality].vector_bytes for modality, n in counts.items())


def to_bytes(vectors: Mapping[str, np.ndarray], vocabulary: Vocabulary) -> bytes:
    """The content of the member KEY.vectors."""
    return b"".join(
        np.ascontiguousarray(vectors[modality], of.storage).tobytes()
        for modality, of in vocabulary.vectors.items()
    )


def from_bytes(content: bytes | memoryview, ids: np.ndarray, vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """The vectors of a document; views of `content`. Raises ValueError unless the ids ask for its size."""
    counts, position = num_vectors(ids, vocabulary), 0
    if len(content) != (expected := _bytes_of(counts, vocabulary)):
        raise ValueError(f"{len(content)} bytes, but the ids have {counts} vectors: {expected} bytes")
    vectors: dict[str, np.ndarray] = {}
    for modality, of in vocabulary.vectors.items():
        size = counts[modality] * of.features
        values = np.frombuffer(content, of.storage, size, position)
        vectors[modality] = values.reshape(counts[modality], of.features)
        position += values.nbytes
    return vectors


def within(
    vectors: Mapping[str, np.ndarray], ids: np.ndarray, start: int, end: int, vocabulary: Vocabulary
) -> dict[str, np.ndarray]:
    """The vectors of ids[start:end], of those of all `ids`; views."""
    if not any(map(len, vectors.values())):
        return dict(vectors)
    cut: dict[str, np.ndarray] = {}
    before, inside = num_vectors(ids[:start], vocabulary), num_vectors(ids[start:end], vocabulary)
    for modality, values in vectors.items():
        cut[modality] = values[before[modality] : before[modality] + inside[modality]]
    return cut


def joined(pieces: Sequence[Mapping[str, np.ndarray]], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """The vectors of pieces that stand one after another; a piece without any need not name a modality."""
    return {
        modality: np.concatenate(
            [
                np.zeros((0, of.features), of.storage),
                *(piece[modality] for piece in pieces if modality in piece),
            ]
        )
        for modality, of in vocabulary.vectors.items()
    }


def of_sequences(
    sequences: Sequence[Sequence[Mapping[str, np.ndarray]]], vocabulary: Vocabulary
) -> dict[str, list[np.ndarray]]:
    """What `make_batch` takes as its `vectors`, from those of the inputs of every piece of each sequence."""
    rows = [joined(pieces, vocabulary) for pieces in sequences]
    return {modality: [row[modality] for row in rows] for modality in vocabulary.vectors}
