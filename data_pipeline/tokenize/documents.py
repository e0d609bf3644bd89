"""A raw sample -> the token ids of its document."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_pipeline.shards.vocabulary import BOS, DELIMITERS, EOS, TEXT
from data_pipeline.tokenize.raw import SampleError, parse_document
from data_pipeline.tokenize.speech import RATE_HZ
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import vocabulary_of

MEASURED_PICTURES = 16
"""So many pictures an encoder decodes again, to measure the round trip."""


class DocumentEncoder:
    """Samples -> ids, with counts of what passed: `tokens` by modality, and `measured` (see `_measure`)."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        self.tokenizers = tokenizers
        self.vocabulary = vocabulary_of(tokenizers)
        self.tokens: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()

    def encode(self, sample: Mapping[str, bytes]) -> np.ndarray:
        """`<bos> parts <eos>`, [n] in the vocabulary's dtype. Raises SampleError, having counted nothing."""
        ids: list[np.ndarray] = [np.array([BOS])]
        measured: Counter[str] = Counter()
        for part in parse_document(sample):
            if part.kind not in self.tokenizers:
                raise SampleError(
                    f"has a part of {part.kind}, for which there is no tokenizer: add [{part.kind}]"
                )
            tokenizer = self.tokenizers[part.kind]
            content = tokenizer.read(part.content)
            codes = tokenizer.encode(content)
            measured.update(self._measure(part.kind, content, codes))
            if part.kind == TEXT:
                ids.append(codes)
            else:
                opening, closing = DELIMITERS[part.kind]
                ids += [np.array([opening]), codes + self.vocabulary.start(part.kind), np.array([closing])]
        document = np.concatenate([*ids, np.array([EOS])])
        if len(document) == 2:
            raise SampleError("all its parts are empty")
        counts = np.bincount(self.vocabulary.modality_of(document), minlength=len(self.vocabulary.sizes))
        self.tokens.update(dict(zip(self.vocabulary.modalities, counts.tolist(), strict=True)))
        self.measured.update(measured)
        return document.astype(self.vocabulary.dtype)

    def _measure(self, kind: str, content: Any, codes: np.ndarray) -> dict[str, float]:
        if kind == TEXT:
            return {"text_bytes": len(content.encode()), "text_tokens": len(codes)}
        if kind == "speech":
            return {"speech_s": len(content) / RATE_HZ, "speech_units": len(codes), "utterances": 1}
        if self.measured["decoded_pictures"] >= MEASURED_PICTURES:
            return {"pictures": 1}
        error = self.tokenizers[kind].decode(codes).astype(np.float64) - content
        return {
            "pictures": 1,
            "decoded_pictures": 1,
            "decoded_values": error.size,
            "decoded_squared_error": float((error**2).sum()),
        }
