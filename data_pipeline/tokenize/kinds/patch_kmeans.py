"""Pictures <-> tokens: each patch is replaced by the nearest of a codebook of patches, made by k-means."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from threadpoolctl import threadpool_limits

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.media.picture_grid import PictureGrid, from_patches, read_grid, to_patches
from data_pipeline.tokenize.media.pictures import PICTURES
from data_pipeline.tokenize.tokenizer import Medium, TokenizerKind, fingerprint_of

CODEBOOK = "codebook.npy"


class PatchConfig(PictureGrid):
    """Settings of a codebook of patches."""

    num_codes: int = Field(512, ge=2)
    num_verbatim: NonNegativeInt = 32
    """Codes that are the commonest patches as they are; the others are k-means centres."""
    fit_patches: PositiveInt = 30_000
    """Distinct patches that k-means sees."""

    @property
    def asked_size(self) -> int:
        return self.num_codes

    @model_validator(mode="after")
    def _check(self) -> "PatchConfig":
        if self.num_verbatim > self.num_codes:
            raise ValueError(f"num_verbatim = {self.num_verbatim} is more than num_codes = {self.num_codes}")
        return self


@dataclass(frozen=True)
class PatchTokenizer:
    """A codebook uint8 [K, patch_px * patch_px * 3], applied to the patches of a picture in reading order.

    With whole numbers on both sides, squared distances are exact in float32 while they stay below 2^24
    (float64 is used for larger patches), so the nearest code is the same on every machine and for any
    number of threads.
    """

    medium: ClassVar[Medium | None] = PICTURES

    config: PatchConfig
    codebook: np.ndarray

    @property
    def size(self) -> int:
        return len(self.codebook)

    @property
    def fingerprint(self) -> str:
        settings = self.config.model_dump(mode="json")
        return fingerprint_of({"kind": "patches", **settings}, self.codebook.tobytes())

    @cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.float32 if 2 * self.codebook.shape[1] * 255**2 < 2**24 else np.float64
        codes = self.codebook.astype(dtype)
        return -2 * codes.T, (codes * codes).sum(1)

    def read(self, data: bytes) -> np.ndarray:
        """The picture as uint8 [size_px, size_px, 3] (see `read_picture`, `fit_picture`)."""
        return read_grid(data, self.config)

    def encode(self, content: np.ndarray) -> np.ndarray:
        """Codes int32 [(size_px / patch_px)^2] of a uint8 [size_px, size_px, 3] picture."""
        return self.encode_patches(to_patches(content, self.config.patch_px))

    def encode_patches(self, patches: np.ndarray) -> np.ndarray:
        """Nearest code, or the first of several, of each patch: int32 [n] of uint8 [n, values of a patch]."""
        minus_two_codes, squares = self._exact
        return (patches.astype(squares.dtype) @ minus_two_codes + squares).argmin(1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The picture, uint8 [size_px, size_px, 3]."""
        return from_patches(self.codebook[codes], self.config.patch_px)

    def save(self, folder: Path) -> None:
        with atomic_file(folder / CODEBOOK) as file:
            np.save(file, self.codebook)


def open_patches(folder: Path, config: PatchConfig) -> PatchTokenizer:
    """The tokenizer that `PatchTokenizer.save` wrote."""
    return PatchTokenizer(config, np.load(folder / CODEBOOK))


def fit_patches(contents: Iterable[np.ndarray], config: PatchConfig, seed: int) -> PatchTokenizer:
    """A codebook for pictures uint8 [size_px, size_px, 3]: their commonest patches as they are, so that flat
    areas stay flat, and k-means centres of the other patches.

    k-means sees every distinct patch once; with their counts, the background would take the codebook. The
    codebook has fewer codes than asked for where there are fewer distinct patches.
    """
    from sklearn.cluster import KMeans

    pictures = list(contents)
    if not pictures:
        raise ConfigError("no picture to fit the image tokenizer on: no document has an image part")
    patches = np.concatenate([to_patches(picture, config.patch_px) for picture in pictures])
    distinct, counts = _distinct(patches)
    commonest = np.argsort(-counts, kind="stable")[: config.num_verbatim]
    verbatim = distinct[commonest]
    others = np.delete(distinct, commonest, axis=0)
    random = np.random.default_rng(seed)
    if len(others) > config.fit_patches:
        others = others[np.sort(random.choice(len(others), config.fit_patches, replace=False))]
    num_means = min(config.num_codes - len(verbatim), len(others))
    means = np.empty((0, patches.shape[1]), np.uint8)
    if num_means:
        kmeans = KMeans(num_means, n_init=1, max_iter=25, random_state=seed)  # pyright: ignore[reportArgumentType]
        with threadpool_limits(1):  # sums over threads come in any order
            kmeans.fit(others.astype(np.float32))
        means = np.round(kmeans.cluster_centers_).astype(np.uint8)
    codebook, _ = _distinct(np.concatenate([verbatim, means]))  # rounding can make two means one
    return PatchTokenizer(config, codebook)


def _distinct(patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distinct rows of uint8 [n, d], in order of first occurrence; number of occurrences of each row).

    Rows are compared by 64-bit hashes, 20 times as fast as numpy's sort of whole rows. Two rows of one hash
    (a chance of 1e-7 among a million rows) would cost k-means one example.
    """
    keys = np.random.default_rng(0).integers(1, 2**63, patches.shape[1], np.uint64) | np.uint64(1)
    hashes = patches.astype(np.uint64) @ keys
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.argsort(first)
    return patches[first[order]], counts[order]


TOKENIZER = TokenizerKind(PatchConfig, read=read_grid, fit=fit_patches, open=open_patches)
