"""A micro-batch of sequences, in numpy on the host."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import reduce

import numpy as np

from data_pipeline.shards.vocabulary import Vocabulary


@dataclass(frozen=True)
class Vectors:
    """The vectors of one modality in a Batch: those of its inputs, by sequence and in it by position."""

    values: np.ndarray
    """uint8 or float16 [n, features], as they are stored."""
    first: np.ndarray
    """int64 [B + 1]; row in `values` of the first vector of each sequence, then n."""

    def rows(self, first: int, last: int) -> "Vectors":
        """Those of sequences first ... last - 1; `values` is a view."""
        begin, end = self.first[first], self.first[last]
        return Vectors(self.values[begin:end], self.first[first : last + 1] - begin)


@dataclass(frozen=True)
class Batch:
    """B sequences of S tokens. A document of n ids fills n - 1 slots: inputs ids[:-1], targets ids[1:].

    So a target never crosses documents and every slot that is not padding is predicted.
    """

    input_ids: np.ndarray
    """int32 [B, S]; padding holds <pad>."""
    target_ids: np.ndarray
    """int32 [B, S]; padding holds <pad>."""
    loss_weights: np.ndarray
    """float32 [B, S]; 0 at padding, at targets of context (data_pipeline/shards/loss_mask.py), and where an
    evaluation asks for no prediction."""
    positions: np.ndarray
    """int32 [B, S]; 0, 1, 2, ... from the start of each document."""
    document_ids: np.ndarray
    """int32 [B, S]; 0, 1, 2, ... in a sequence, -1 at padding. Non-padding is a prefix of the sequence."""
    input_modality: np.ndarray
    """uint8 [B, S]; index into the vocabulary's modalities."""
    input_special: np.ndarray
    """bool [B, S]; whether the input is a special token, as <bos>, delimiters and <pad> are."""
    target_modality: np.ndarray
    """uint8 [B, S]."""
    samples: tuple[tuple[str, ...], ...]
    """Per sequence, "shard/key" of each document in it: provenance for error messages."""
    vectors: Mapping[str, Vectors] = field(default_factory=dict)
    """Modality of vectors -> the vectors of its inputs, of which there is one wherever input_ids holds the
    modality's code; empty where all modalities are ids."""

    @property
    def num_sequences(self) -> int:
        return self.input_ids.shape[0]

    @property
    def sequence_tokens(self) -> int:
        return self.input_ids.shape[1]

    @property
    def digest(self) -> int:
        """32 bits of all its arrays: ranks that should train on the same batch compare it."""
        arrays = [value for value in vars(self).values() if isinstance(value, np.ndarray)]
        arrays += [vectors.values for vectors in self.vectors.values()]
        return reduce(lambda crc, array: zlib.crc32(array.tobytes(), crc), arrays, 0)

    def rows(self, first: int, last: int) -> "Batch":
        """Sequences first ... last - 1; views, no copies."""
        cut = {f.name: getattr(self, f.name)[first:last] for f in fields(self) if f.name != "vectors"}
        vectors = {modality: vectors.rows(first, last) for modality, vectors in self.vectors.items()}
        return Batch(**cut, vectors=vectors)


def make_batch(
    sequences: Sequence[Sequence[np.ndarray]],
    *,
    sequence_tokens: int,
    vocabulary: Vocabulary,
    samples: Sequence[Sequence[str]] | None = None,
    targets: Sequence[Sequence[np.ndarray | None]] | None = None,
    vectors: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Batch:
    """Lay documents (or pieces of them) out in sequences.

    `sequences[b]` holds the documents of sequence b in order, each int [n] with n >= 2, filling n - 1 slots;
    the rest of `sequence_tokens` is padding. `samples[b]` names them. `targets[b]`: which slots of each
    document count, bool [n - 1]; None: all. `vectors[m][b]`: the vectors of modality m among the inputs of
    sequence b, [n, features] in the modality's storage dtype. Raises ValueError if they do not fit.
    """
    input_ids = np.full((len(sequences), sequence_tokens), vocabulary.pad, np.int32)
    target_ids = input_ids.copy()
    slots: list[int] = []  # slots of each document and then of the padding, sequence by sequence
    numbers: list[int] = []  # document_ids of these documents and paddings
    for row, documents in enumerate(sequences):
        lengths = _fill(row, documents, input_ids[row], target_ids[row])
        slots += [*lengths, sequence_tokens - sum(lengths)]
        numbers += [*range(len(lengths)), -1]
    document_ids = np.repeat(np.array(numbers, np.int32), slots).reshape(input_ids.shape)
    starts = np.repeat(np.cumsum([0, *slots[:-1]], dtype=np.int32), slots)
    positions = np.arange(input_ids.size, dtype=np.int32) - starts
    return Batch(
        input_ids=input_ids,
        target_ids=target_ids,
        loss_weights=_loss_weights(document_ids, sequences, targets),
        positions=positions.reshape(input_ids.shape),
        document_ids=document_ids,
        input_modality=vocabulary.modality_of(input_ids),
        input_special=vocabulary.is_special(input_ids),
        target_modality=vocabulary.modality_of(target_ids),
        samples=tuple(tuple(names) for names in samples) if samples else ((),) * len(sequences),
        vectors=_vectors(input_ids, vocabulary, vectors or {}),
    )


def _vectors(
    input_ids: np.ndarray, vocabulary: Vocabulary, given: Mapping[str, Sequence[np.ndarray]]
) -> dict[str, Vectors]:
    """Modality -> its vectors, one for each input that is its code. Raises ValueError for other numbers."""
    made: dict[str, Vectors] = {}
    for modality, of in vocabulary.vectors.items():
        places = (input_ids == vocabulary.first_code(modality)).sum(axis=1).tolist()
        values = given.get(modality, [np.zeros((0, of.features), of.storage)] * len(places))
        if (counts := [len(each) for each in values]) != places:
            raise ValueError(f"vectors of {modality}: {counts} in the sequences, which have {places} places")
        made[modality] = Vectors(np.concatenate(values), np.cumsum([0, *places]))
    return made


def _loss_weights(
    document_ids: np.ndarray,
    sequences: Sequence[Sequence[np.ndarray]],
    targets: Sequence[Sequence[np.ndarray | None]] | None,
) -> np.ndarray:
    """float32 [B, S]; 1 in slots of documents, 0 where `targets` of make_batch says so, and at padding."""
    weights = (document_ids >= 0).astype(np.float32)
    for row, counted in enumerate(targets or ()):
        ends = np.cumsum([len(ids) - 1 for ids in sequences[row]])
        for end, own in zip(ends, counted, strict=True):
            if own is not None:
                weights[row, end - len(own) : end] = own
    return weights


def _fill(row: int, documents: Sequence[np.ndarray], inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Write documents into the slots of sequence `row`, in place. Returns the slots that each document fills.

    Raises ValueError if they do not fit.
    """
    start, lengths = 0, []
    for number, ids in enumerate(documents):
        end = start + len(ids) - 1
        if end <= start or end > len(inputs):
            raise ValueError(
                f"sequence {row}: document {number} has {len(ids)} ids, where {len(inputs) - start} of "
                f"{len(inputs)} slots are left and a document needs at least 2 ids"
            )
        inputs[start:end] = ids[:-1]
        targets[start:end] = ids[1:]
        lengths.append(end - start)
        start = end
    return lengths
