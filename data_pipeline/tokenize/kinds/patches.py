"""Pictures <-> vectors: the pixels of each patch are a vector, so nothing but the resizing is lost."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import VectorFormat
from data_pipeline.tokenize.media.picture_grid import PictureGrid, from_patches, read_grid, to_patches
from data_pipeline.tokenize.media.pictures import PICTURES
from data_pipeline.tokenize.tokenizer import Medium, TokenizerKind, fingerprint_of

PIXELS = "pixels.json"


class PixelConfig(PictureGrid):
    """Settings of patches whose pixels are vectors of patch_px * patch_px * channels values."""

    channels: Literal[1, 3] = 3
    """3: red, green and blue; 1: grey."""


@dataclass(frozen=True)
class PixelPatches:
    """Patches in reading order. A model sees (pixel - mean) / std, of all pixels of the training pictures."""

    medium: ClassVar[Medium | None] = PICTURES

    config: PixelConfig
    mean: float
    std: float

    @property
    def size(self) -> int:
        return 1

    @property
    def vectors(self) -> VectorFormat:
        features = self.config.patch_px**2 * self.config.channels
        return VectorFormat(features=features, dtype="uint8", mean=self.mean, std=self.std)

    @property
    def fingerprint(self) -> str:
        settings = self.config.model_dump(mode="json")
        return fingerprint_of({"kind": "pixels", "mean": self.mean, "std": self.std, **settings})

    def read(self, data: bytes) -> np.ndarray:
        """The picture as uint8 [size_px, size_px, 3]; a grey one has three equal channels."""
        return _read(data, self.config)

    def encode(self, content: np.ndarray) -> np.ndarray:
        """uint8 [(size_px / patch_px)^2, features] of a picture uint8 [size_px, size_px, 3]."""
        return to_patches(content[..., : self.config.channels], self.config.patch_px)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The picture, uint8 [size_px, size_px, 3], of the vectors that `encode` gives."""
        picture = from_patches(codes, self.config.patch_px)
        return picture.repeat(3 // self.config.channels, axis=2)

    def save(self, folder: Path) -> None:
        write_json(folder / PIXELS, {"mean": self.mean, "std": self.std})


def open_pixels(folder: Path, config: PixelConfig) -> PixelPatches:
    """The tokenizer that `PixelPatches.save` wrote."""
    saved = json.loads((folder / PIXELS).read_text())
    return PixelPatches(config, float(saved["mean"]), float(saved["std"]))


def _read(data: Any, config: PixelConfig) -> np.ndarray:
    picture = read_grid(data, config)
    if config.channels == 3:
        return picture
    return np.asarray(Image.fromarray(picture).convert("L"))[..., None].repeat(3, axis=2)


def fit_pixels(contents: Iterable[np.ndarray], config: PixelConfig, seed: int) -> PixelPatches:
    """The mean and standard deviation of all pixels of pictures uint8 [size_px, size_px, 3].

    Sums are whole numbers, so the order of the pictures changes nothing. Raises ConfigError for pictures of
    one even colour, which have no deviation.
    """
    count = total = squares = 0
    for picture in contents:
        pixels = picture[..., : config.channels].astype(np.int64)
        count, total, squares = (
            count + pixels.size,
            total + int(pixels.sum()),
            squares + int((pixels**2).sum()),
        )
    if count * squares == total**2:
        raise ConfigError("no picture with two colours to fit the image tokenizer on: std would be 0")
    return PixelPatches(config, total / count, (count * squares - total**2) ** 0.5 / count)


TOKENIZER = TokenizerKind(PixelConfig, read=_read, fit=fit_pixels, open=open_pixels)
