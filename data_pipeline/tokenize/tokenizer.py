"""The interface of tokenizers: content of one modality <-> integer codes; a file a modality has one."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError

SETTINGS = "settings.json"


class Tokenizer(Protocol):
    """What prepare.py asks of a tokenizer. Content: str, uint8 [H, W, 3] or `speech.Wave`."""

    @property
    def size(self) -> int:
        """Number of codes."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what encode or decode return."""
        ...

    @property
    def settings(self) -> Mapping[str, Any]:
        """What it was made with, for the manifest."""
        ...

    def read(self, data: Any) -> Any:
        """Content of a raw part (a text, or the bytes of a file). Raises raw.SampleError."""
        ...

    def encode(self, content: Any) -> np.ndarray:
        """Codes int32 [n] of 0 .. size - 1. Raises raw.SampleError where there is nothing to encode."""
        ...

    def decode(self, codes: np.ndarray) -> Any:
        """Content again; exactly so only for text."""
        ...

    def save(self, folder: Path) -> None:
        """Write into a new folder; the class's `load(folder)` reads it back."""
        ...


def fingerprint_of(settings: Mapping[str, Any], *contents: bytes) -> str:
    """64 bits in hex over settings and contents (codebooks, model file)."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for content in contents:
        digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()[:16]


def save_settings(folder: Path, tokenizer: Tokenizer) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / SETTINGS, {"fingerprint": tokenizer.fingerprint, "settings": dict(tokenizer.settings)}
    )


def load_settings(folder: Path) -> dict[str, Any]:
    """The settings that `save_settings` wrote."""
    try:
        return json.loads((folder / SETTINGS).read_text())["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a saved tokenizer ({type(error).__name__}: {error})") from None


def check_fingerprint(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise ConfigError if files of a saved tokenizer were changed or mixed up after it was saved."""
    saved = json.loads((folder / SETTINGS).read_text())["fingerprint"]
    if saved != tokenizer.fingerprint:
        raise ConfigError(
            f"{folder}: fingerprint {tokenizer.fingerprint}, but {SETTINGS} says {saved}: its files were "
            "changed after they were saved"
        )
