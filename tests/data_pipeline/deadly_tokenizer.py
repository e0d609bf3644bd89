"""A tokenizer whose decoder does what a file says: it crashes, hangs, or takes memory. For tests.

[fault]
kind = "tests.data_pipeline.deadly_tokenizer"
"""

import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig, TokenizerKind


def obey(data: bytes, _: Any = None) -> bytes:
    """Do what `data` says, as a faulty decoder would, or return it."""
    match data:
        case b"crash":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # without the long report of pytest's handler
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"exit":
            os._exit(3)
        case b"hang":
            time.sleep(600)
        case b"memory":
            np.ones(1 << 33, np.uint8)
        case b"stack":
            return obey(data, None)  # without a default, whose calls Python 3.13.0 does not count
        case b"error":
            raise KeyError("\x1b[2J")
    return data


@dataclass(frozen=True)
class Deadly:
    """One code a byte."""

    medium: ClassVar[Medium | None] = None
    config: TokenizerConfig
    size: int = 256
    fingerprint: str = "deadly"

    def read(self, data: bytes) -> bytes:
        return obey(data)

    def encode(self, content: bytes) -> np.ndarray:
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, codes: np.ndarray) -> bytes:
        return codes.astype(np.uint8).tobytes()

    def save(self, folder: Path) -> None: ...


def _fit(contents: Iterable[bytes], config: TokenizerConfig, seed: int) -> Deadly:
    assert all(isinstance(content, bytes) for content in contents)
    return Deadly(config)


TOKENIZER = TokenizerKind(TokenizerConfig, read=obey, fit=_fit, open=lambda _, config: Deadly(config))
