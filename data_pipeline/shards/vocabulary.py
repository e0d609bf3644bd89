"""One id space for all modalities: text first, with the special tokens, then a range for each other modality.

    0 .. 6                     <pad> <bos> <eos> and the delimiters of images and speech
    7 .. text size - 1         other tokens of the text tokenizer
    ranges of image, speech    their codes
    range of any other         its opening delimiter, its closing delimiter, then its codes

A text tokenizer that was trained elsewhere keeps its ids 0, 1, 2, ...; the special tokens that it lacks get
the ids behind them. A modality beyond the three brings its delimiters inside of its own range, so adding it
moves no other id.

A modality is ids or vectors. One of vectors has a single code, which stands in a document wherever a vector
does; the vectors travel beside the ids, in the same order.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

TEXT = "text"
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<boi>", "<eoi>", "<bos_speech>", "<eos_speech>")
"""Special tokens of every vocabulary; they are tokens of text."""
PAD, BOS, EOS, BOI, EOI, BOS_SPEECH, EOS_SPEECH = FIRST_IDS = tuple(range(len(SPECIAL_TOKENS)))
"""Positions in SPECIAL_TOKENS, and the ids of these tokens unless a text tokenizer was trained elsewhere."""
DELIMITERS = {"image": (BOI, EOI), "speech": (BOS_SPEECH, EOS_SPEECH)}
"""Modality -> positions in SPECIAL_TOKENS of the delimiters of its spans. Other modalities have theirs in
their own range.
"""
NUM_DELIMITERS = 2


class VectorFormat(BaseModel):
    """How the vectors of a modality are stored, and how a model is to see them: (stored - mean) / std."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    features: PositiveInt
    dtype: Literal["uint8", "float16"]
    mean: float = 0.0
    std: float = Field(1.0, gt=0)

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype of stored values, little-endian."""
        return np.dtype("u1" if self.dtype == "uint8" else "<f2")

    @property
    def vector_bytes(self) -> int:
        """Bytes of a stored vector."""
        return self.features * self.storage.itemsize

    def normalised(self, stored: np.ndarray) -> np.ndarray:
        """float32, same shape: stored values as a model sees them."""
        return (stored.astype(np.float32) - np.float32(self.mean)) / np.float32(self.std)

    def stored(self, normalised: np.ndarray) -> np.ndarray:
        """The inverse of `normalised`, in the storage dtype; pixels are rounded and clipped to 0 ... 255."""
        values = normalised * self.std + self.mean
        if self.dtype == "uint8":
            values = np.clip(np.rint(values), 0, 255)
        return values.astype(self.storage)


class Vocabulary(BaseModel):
    """Ids per modality, in id order, text first. Modality m has ids [start(m), start(m) + sizes[m])."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sizes: dict[str, PositiveInt]
    special_ids: tuple[NonNegativeInt, ...] = FIRST_IDS
    """Ids of SPECIAL_TOKENS, in their order."""
    vectors: dict[str, VectorFormat] = {}
    """Modality of vectors -> their format; all other modalities are ids."""

    @model_validator(mode="after")
    def _check(self) -> "Vocabulary":
        if next(iter(self.sizes), None) != TEXT:
            raise ValueError(f'the first modality must be "{TEXT}", got {list(self.sizes)}')
        for name, size in self.sizes.items():
            if size <= self._num_own_delimiters(name):
                raise ValueError(f"{name} has {size} ids, but its two delimiters and a code need 3 or more")
        for name in self.vectors:
            if name == TEXT or self.sizes.get(name) != self.size_of(name, 1):
                raise ValueError(
                    f"vectors of {name}, which has {self.sizes.get(name, 0)} ids; a modality of vectors is "
                    f"not {TEXT} and has one code: {self.size_of(name, 1)} ids"
                )
        if list(self.vectors) != [name for name in self.sizes if name in self.vectors]:
            raise ValueError(f"vectors of {list(self.vectors)} are not in the order of the vocabulary")
        ids = self.special_ids
        if ids != FIRST_IDS and not (
            len(set(ids)) == len(FIRST_IDS) == len(ids) and max(ids) < self.sizes[TEXT]
        ):
            raise ValueError(
                f"special tokens have the ids {list(ids)}; legal: {len(FIRST_IDS)} different ids below "
                f"{self.sizes[TEXT]}, the size of text"
            )
        return self

    @staticmethod
    def values_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Values of the fields, not yet checked, that the manifest of a folder of token shards holds."""
        sizes, ids = manifest["vocabulary"], manifest.get("special_tokens")
        return {"sizes": sizes, "vectors": manifest.get("vectors", {})} | (
            {} if ids is None else {"special_ids": [ids.get(n) for n in SPECIAL_TOKENS]}
        )

    def manifest_values(self) -> dict[str, Any]:
        """The entries of a manifest that `values_of` reads."""
        ids = dict(zip(SPECIAL_TOKENS, self.special_ids, strict=True))
        return {
            "vocabulary": self.sizes,
            **({} if self.special_ids == FIRST_IDS else {"special_tokens": ids}),
            **({"vectors": {m: v.model_dump() for m, v in self.vectors.items()}} if self.vectors else {}),
        }

    @property
    def pad(self) -> int:
        """The id of <pad>."""
        return self.special_ids[PAD]

    @property
    def bos(self) -> int:
        """The id of <bos>, which begins every document."""
        return self.special_ids[BOS]

    @property
    def eos(self) -> int:
        """The id of <eos>, which ends every document."""
        return self.special_ids[EOS]

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
        """First id of a modality's range."""
        names = self.modalities
        return sum(self.sizes[name] for name in names[: names.index(modality)])

    def first_code(self, modality: str) -> int:
        """The id of code 0 of a modality's tokenizer."""
        return self.start(modality) + self._num_own_delimiters(modality)

    def delimiters(self, modality: str) -> tuple[int, int]:
        """The special tokens (opening, closing) around a span of a modality other than text."""
        start = self.start(modality)
        if modality in DELIMITERS:
            opening, closing = DELIMITERS[modality]
            return self.special_ids[opening], self.special_ids[closing]
        return start, start + 1

    @staticmethod
    def size_of(modality: str, num_codes: int) -> int:
        """Ids that a modality needs for the codes of its tokenizer: its delimiters may be among them."""
        return num_codes + Vocabulary._num_own_delimiters(modality)

    @staticmethod
    def _num_own_delimiters(modality: str) -> int:
        return 0 if modality == TEXT or modality in DELIMITERS else NUM_DELIMITERS

    @cached_property
    def _is_special(self) -> np.ndarray:
        special = np.zeros(self.size, bool)
        special[[i for i in self.special_ids if i < self.sizes[TEXT]]] = True
        for name in self.modalities:
            start = self.start(name)
            special[start : start + self._num_own_delimiters(name)] = True
        return special

    @cached_property
    def _modality(self) -> np.ndarray:
        modality = np.repeat(np.arange(len(self.sizes), dtype=np.uint8), list(self.sizes.values()))
        modality[self._is_special] = 0
        return modality

    def modality_of(self, ids: np.ndarray) -> np.ndarray:
        """Index into `modalities` for each id: uint8, same shape; special tokens are text. Raises IndexError
        for an id outside.
        """
        return self._modality.take(ids)  # three times as fast as indexing, with the same checks

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """Whether each id is a special token: bool, same shape. Raises IndexError for an id outside."""
        return self._is_special.take(ids)
