"""One id space for all modalities: text first, with the special tokens, then a range for each other one."""

from functools import cached_property
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator

TEXT = "text"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<bos_speech>", "<eos_speech>")
"""They belong to the text modality; sentencepiece holds them as control symbols at ids 0, 1, 2, ..."""
PAD, BOS, EOS, BOI, EOI, BOS_SPEECH, EOS_SPEECH = range(len(SPECIAL_TOKENS))
DELIMITERS = {"image": (BOI, EOI), "speech": (BOS_SPEECH, EOS_SPEECH)}
"""Modality -> the special tokens around one of its spans."""


class Vocabulary(BaseModel):
    """Sizes per modality, in id order, text first. Modality m has ids [start(m), start(m) + sizes[m])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: dict[str, PositiveInt]

    @model_validator(mode="after")
    def _check(self) -> "Vocabulary":
        if next(iter(self.sizes), None) != TEXT:
            raise ValueError(f'the first modality must be "{TEXT}", got {list(self.sizes)}')
        unknown = [name for name in self.sizes if name != TEXT and name not in DELIMITERS]
        if unknown:
            raise ValueError(f"modalities {unknown} have no delimiter tokens; known: {[TEXT, *DELIMITERS]}")
        return self

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.sizes)

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @property
    def dtype(self) -> np.dtype[Any]:
        """Storage of a document: uint16 where every id fits, else uint32. Little-endian."""
        return np.dtype("<u2") if self.size <= 1 << 16 else np.dtype("<u4")

    def start(self, modality: str) -> int:
        """First id of a modality."""
        names = self.modalities
        return sum(self.sizes[name] for name in names[: names.index(modality)])

    @cached_property
    def _lookup(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.sizes), dtype=np.uint8), list(self.sizes.values()))

    def modality_of(self, ids: np.ndarray) -> np.ndarray:
        """Index into `modalities` for each id: uint8, same shape. Raises IndexError for an id outside."""
        return self._lookup.take(ids)  # three times as fast as indexing, with the same checks
