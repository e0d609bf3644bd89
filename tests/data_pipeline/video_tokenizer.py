"""A tokenizer of a modality that the project does not know: clips of grey frames, one code a frame.

It is all that a fourth modality needs beside its table in a data config:

    [video]
    kind = "tests.data_pipeline.video_tokenizer"
"""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig, TokenizerKind, fingerprint_of


class VideoConfig(TokenizerConfig):
    num_codes: int = Field(8, ge=2)


@dataclass(frozen=True)
class Video:
    """The code of a frame is the number of `thresholds` float32 [num_codes - 1] below its mean brightness."""

    medium: ClassVar[Medium | None] = None

    config: VideoConfig
    thresholds: np.ndarray

    @property
    def size(self) -> int:
        return len(self.thresholds) + 1

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": "brightness"}, self.thresholds.tobytes())

    def read(self, data: bytes) -> np.ndarray:
        return read_clip(data, self.config)

    def encode(self, content: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.thresholds, content.mean((1, 2))).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """uint8 [frames, 1, 1]: a threshold beside the brightness."""
        return self.thresholds[np.maximum(codes - 1, 0)].astype(np.uint8)[:, None, None]

    def save(self, folder: Path) -> None:
        np.save(folder / "thresholds.npy", self.thresholds)


def read_clip(data: bytes, config: VideoConfig) -> np.ndarray:
    """uint8 [frames, height, width] of a .npy file."""
    try:
        clip = np.load(io.BytesIO(data))
    except ValueError as error:
        raise SampleError(f"the clip cannot be decoded: {error}") from None
    if clip.ndim != 3 or not clip.size:
        raise SampleError(f"a clip is [frames, height, width], got {list(clip.shape)}")
    return clip


def fit(contents: Iterable[Any], config: VideoConfig, seed: int) -> Video:
    brightness = np.concatenate([clip.mean((1, 2)) for clip in contents])
    shares = np.linspace(0, 1, config.num_codes + 1)[1:-1]
    return Video(config, np.unique(np.quantile(brightness, shares).astype(np.float32)))


def load(folder: Path, config: VideoConfig) -> Video:
    return Video(config, np.load(folder / "thresholds.npy"))


TOKENIZER = TokenizerKind(VideoConfig, read=read_clip, fit=fit, open=load)
