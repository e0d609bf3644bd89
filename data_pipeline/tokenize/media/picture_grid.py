"""Pictures of one size, cut into a grid of square patches in reading order."""

from typing import Any

import numpy as np
from pydantic import PositiveInt, model_validator

from data_pipeline.tokenize.media.pictures import Fit, fit_picture, read_picture
from data_pipeline.tokenize.tokenizer import TokenizerConfig


class PictureGrid(TokenizerConfig):
    """Settings of a tokenizer whose picture is a grid of patches."""

    size_px: PositiveInt = 32
    """Pictures are brought to size_px x size_px; each gives (size_px / patch_px)^2 tokens."""
    patch_px: PositiveInt = 4
    fit: Fit = "crop"
    """How a picture of another size is brought to it: centre crop, black bars, or another aspect ratio."""

    @property
    def content_codes(self) -> int:
        return (self.size_px // self.patch_px) ** 2

    @model_validator(mode="after")
    def _check_grid(self) -> "PictureGrid":
        if self.size_px % self.patch_px:
            raise ValueError(f"size_px = {self.size_px} is not a multiple of patch_px = {self.patch_px}")
        return self


def read_grid(data: Any, config: PictureGrid) -> np.ndarray:
    """The picture of a file's bytes as uint8 [size_px, size_px, 3] (see `read_picture`, `fit_picture`)."""
    return fit_picture(read_picture(data), config.size_px, config.fit)


def to_patches(picture: np.ndarray, patch_px: int) -> np.ndarray:
    """[H, W, channels] -> [H * W / patch_px^2, patch_px * patch_px * channels], patches in reading order."""
    rows, columns = picture.shape[0] // patch_px, picture.shape[1] // patch_px
    split = picture.reshape(rows, patch_px, columns, patch_px, -1).transpose(0, 2, 1, 3, 4)
    return split.reshape(rows * columns, -1)


def from_patches(patches: np.ndarray, patch_px: int) -> np.ndarray:
    """Inverse of `to_patches` for a square picture."""
    side = round(len(patches) ** 0.5)
    split = patches.reshape(side, side, patch_px, patch_px, -1).transpose(0, 2, 1, 3, 4)
    return split.reshape(side * patch_px, side * patch_px, -1)
