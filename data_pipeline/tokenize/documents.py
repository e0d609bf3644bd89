"""Raw samples -> token ids of documents, and the vectors beside them."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.shards.loss_mask import masked_ranges
from data_pipeline.shards.tar import Sample
from data_pipeline.shards.vectors import joined
from data_pipeline.shards.vocabulary import TEXT, VectorFormat
from data_pipeline.tokenize.layout import RAW, SourceSettings
from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.raw import Part, SampleError
from data_pipeline.tokenize.roundtrip import add_figures, figures_of
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import vocabulary_of


@dataclass(frozen=True)
class Encoded:
    """A document as token ids, and vectors."""

    ids: np.ndarray
    """`<bos> parts <eos>`, [n] in the vocabulary's dtype."""
    masked: np.ndarray
    """Ranges of ids that are no targets, int64 [m, 2] (data_pipeline/shards/loss_mask.py)."""
    tokens: Mapping[str, int]
    """By modality."""
    measured: Mapping[str, float]
    """Figures of the round trip."""
    vectors: Mapping[str, np.ndarray]
    """By modality of vectors (data_pipeline/shards/vectors.py)."""


class DocumentEncoder:
    """Encodes samples. Over the documents that are added it sums `tokens` by modality, and `measured`:
    figures of the round trip.
    """

    def __init__(
        self, tokenizers: Mapping[str, Tokenizer], limits: Limits, source: SourceSettings = RAW
    ) -> None:
        self.tokenizers, self.limits, self.source = tokenizers, limits, source
        self.vocabulary = vocabulary_of(tokenizers)
        self.tokens: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()
        self.num_masked = 0
        """Ids that are no targets, of the documents that were added."""

    def encode(self, sample: Sample, key: str = "") -> Encoded:
        """The document of a sample of that key, which is not added. Raises SampleError."""
        measured: Counter[str] = Counter()
        parts = parts_within(sample, self.limits, key=key, source=self.source)
        encoded = [self._encode_part(part, measured) for part in parts]
        ids = [of_part for of_part, _ in encoded]
        document = np.concatenate([[self.vocabulary.bos], *ids, [self.vocabulary.eos]])
        if len(document) == 2:
            raise SampleError("all its parts are empty")
        masked = masked_ranges([len(part) for part in ids], [part.loss for part in parts])
        if (masked[:, 1] - masked[:, 0]).sum() == len(document) - 2:
            raise SampleError("all its parts are context (loss = false), so it teaches nothing")
        counts = np.bincount(self.vocabulary.modality_of(document), minlength=len(self.vocabulary.sizes))
        tokens = dict(zip(self.vocabulary.modalities, counts.tolist(), strict=True))
        vectors = joined([of_part for _, of_part in encoded], self.vocabulary)
        return Encoded(document.astype(self.vocabulary.dtype), masked, tokens, measured, vectors)

    def add(self, document: Encoded) -> None:
        """Add a document's counts and figures to the sums."""
        self.tokens.update(document.tokens)
        self.measured.update(document.measured)
        self.num_masked += int((document.masked[:, 1] - document.masked[:, 0]).sum())

    def _encode_part(self, part: Part, measured: Counter[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(ids of a part with its delimiters, its vectors); its figures are added to `measured`."""
        tokenizer = self.tokenizers.get(part.modality)
        if tokenizer is None:
            raise SampleError(
                f"has a part of {part.modality}, for which there is no tokenizer: add [{part.modality}]; "
                f"there are {', '.join(self.tokenizers)}"
            )
        content = tokenizer.read(part.data)
        codes = tokenizer.encode(content)
        if tokenizer.medium is not None:
            sums = figures_of(part.modality, self.measured)
            figures = tokenizer.medium.measure(tokenizer, content, codes, sums)
            add_figures(part.modality, figures, measured)
        vectors = joined([], self.vocabulary)
        if part.modality == TEXT:
            return codes, vectors
        if part.modality in vectors:
            _check_vectors(codes, part.modality, self.vocabulary.vectors[part.modality])
            vectors[part.modality], codes = codes, np.zeros(len(codes), np.int32)
        opening, closing = self.vocabulary.delimiters(part.modality)
        ids = np.concatenate([[opening], codes + self.vocabulary.first_code(part.modality), [closing]])
        return ids, vectors


def _check_vectors(vectors: np.ndarray, modality: str, of: VectorFormat) -> None:
    """Raise SampleError unless vectors are finite, [n, features], and of the dtype that their format says."""
    if vectors.dtype != of.storage or vectors.ndim != 2 or vectors.shape[1] != of.features:
        raise SampleError(
            f"its {modality} becomes {vectors.dtype} {list(vectors.shape)}, but the tokenizer's format is "
            f"{of.dtype} [n, {of.features}]"
        )
    if not np.isfinite(vectors).all():
        raise SampleError(f"its {modality} becomes vectors that are not finite")
