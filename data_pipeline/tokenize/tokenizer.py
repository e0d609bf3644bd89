"""The interface of tokenizers: content of one modality <-> integer codes, or vectors.

A kind of tokenizer is one module, which defines a config model, a tokenizer and, as the last thing,

    TOKENIZER = TokenizerKind(config=..., read=..., fit=..., open=...)

The module must import quickly and without torch: `motley tokenize` imports it to check a config. Heavy
libraries are imported inside of the functions that need them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from data_pipeline.shards.vocabulary import VectorFormat


class TokenizerConfig(BaseModel):
    """Base of the models of tokenizer tables in a data config: values are fixed, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def asked_size(self) -> int | None:
        """Number of codes that the settings ask for, of which fitting may make fewer; None: it makes any."""
        return None

    @property
    def content_codes(self) -> int | None:
        """Number of codes, or of vectors, that every content becomes; None: it depends on the content."""
        return None


class Tokenizer(Protocol):
    """A fitted tokenizer. What content is, such as str or uint8 [H, W, 3], is the tokenizer's own affair.

    A tokenizer of vectors has one property more, `vectors`: their VectorFormat. Its codes are vectors, [n,
    features] in the format's storage dtype, and its size is 1 (see `vector_format`).
    """

    medium: ClassVar["Medium | None"]
    """How a person judges the content; None: tokens are counted and nothing else is measured."""

    @property
    def config(self) -> TokenizerConfig:
        """The settings that the tokenizer was made with, for the manifest and to open it again."""
        ...

    @property
    def size(self) -> int:
        """The number of codes that the tokenizer can give."""
        ...

    @property
    def fingerprint(self) -> str:
        """A hash that differs between tokenizers whose encode or decode differ; see `fingerprint_of`."""
        ...

    def read(self, data: Any) -> Any:
        """The content of a raw part: of a str for text, else of a file's bytes. Raises raw.SampleError."""
        ...

    def encode(self, content: Any) -> np.ndarray:
        """Codes int32 [n] of 0 .. size - 1. Raises raw.SampleError where there is nothing to encode."""
        ...

    def decode(self, codes: np.ndarray) -> Any:
        """Content from codes; only text comes back exactly."""
        ...

    def save(self, folder: Path) -> None:
        """Write the tokenizer's own files into an empty folder. Its config is saved by the caller."""
        ...


@dataclass(frozen=True)
class TokenizerKind:
    """What a module in kinds/ gives to the registry."""

    config: type[TokenizerConfig]
    """Model of the modality's table in the data config, without the key `kind`."""
    read: Callable[[Any, Any], Any]
    """(data of a raw part, config) -> content, as `Tokenizer.read`, before there is a tokenizer."""
    fit: Callable[[Iterable[Any], Any, int], Tokenizer]
    """(contents, config, seed) -> tokenizer. Contents are read from the shards while they are iterated, and
    only if they are; the iteration raises ConfigError where the shards hold none.
    """
    open: Callable[[Path, Any], Tokenizer]
    """(folder that `save` wrote, config) -> tokenizer."""


@dataclass(frozen=True)
class Medium:
    """How a person judges what a tokenizer keeps of pictures, of sound, or of text."""

    measure: Callable[[Tokenizer, Any, np.ndarray, Mapping[str, float]], Mapping[str, float]]
    """(tokenizer, content, its codes, figures so far) -> figures to add to those of the manifest."""
    summary: Callable[[Mapping[str, float]], str | None]
    """Figures of a split -> what the terminal says of them; None where nothing was measured."""
    num_shown: int = 0
    """Contents that `show` takes."""
    suffix: str = ""
    """Ending of the file that `show` makes."""
    show: Callable[[list[tuple[Any, Any]]], bytes] | None = None
    """(content, decoded content) pairs -> a file to look at or to listen to."""
    file: Callable[[Any], bytes] | None = None
    """One content -> the same kind of file."""


def vector_format(tokenizer: Tokenizer) -> VectorFormat | None:
    """The format of the vectors that a tokenizer gives; None for one that gives integer codes."""
    return getattr(tokenizer, "vectors", None)


def fingerprint_of(settings: Mapping[str, Any], *contents: bytes) -> str:
    """Return a hash, 64 bits in hex, of a tokenizer's settings and contents (codebooks, model file)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]
