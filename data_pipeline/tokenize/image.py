"""Pictures <-> tokens: each patch is replaced by the nearest of a codebook of patches."""

import io
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from threadpoolctl import threadpool_limits

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import ImageConfig
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import check_fingerprint, fingerprint_of, load_settings, save_settings

CODEBOOK = "codebook.npy"
_PEAK = 255.0


@dataclass(frozen=True)
class PatchTokenizer:
    """Codes run over patches in reading order. The codebook is uint8 [K, patch_px * patch_px * 3].

    With whole numbers on both sides, squared distances are exact in float32 while they stay below 2^24
    (float64 is used for larger patches), so the nearest code is the same on every machine and for any
    number of threads.
    """

    config: ImageConfig
    codebook: np.ndarray

    @property
    def size(self) -> int:
        return len(self.codebook)

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.config.model_dump(mode="json")

    @property
    def fingerprint(self) -> str:
        return fingerprint_of({"kind": "patches", **self.settings}, self.codebook.tobytes())

    @cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.float32 if 2 * self.codebook.shape[1] * 255**2 < 2**24 else np.float64
        codes = self.codebook.astype(dtype)
        return -2 * codes.T, (codes * codes).sum(1)

    def read(self, data: bytes) -> np.ndarray:
        """The picture as uint8 [size_px, size_px, 3] (see `read_picture`, `fit_picture`)."""
        return fit_picture(read_picture(data), self.config)

    def encode(self, content: np.ndarray) -> np.ndarray:
        """Codes int32 [(size_px / patch_px)^2] of a uint8 [size_px, size_px, 3] picture."""
        return self.encode_patches(to_patches(content, self.config.patch_px))

    def encode_patches(self, patches: np.ndarray) -> np.ndarray:
        """Nearest code of each of uint8 [n, patch_px * patch_px * 3]; of equally near ones the first."""
        minus_two_codes, squares = self._exact
        return (patches.astype(squares.dtype) @ minus_two_codes + squares).argmin(1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """The picture, uint8 [size_px, size_px, 3]."""
        return from_patches(self.codebook[codes], self.config.patch_px)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(folder / CODEBOOK) as file:
            np.save(file, self.codebook)
        save_settings(folder, self)

    @classmethod
    def load(cls, folder: Path) -> "PatchTokenizer":
        config = ImageConfig.model_validate(load_settings(folder))
        tokenizer = cls(config, np.load(folder / CODEBOOK))
        check_fingerprint(folder, tokenizer)
        return tokenizer


def read_picture(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an image file: upright (EXIF), transparency on white, 16-bit grey scaled to 8.

    Raises SampleError for what Pillow cannot decode whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data))
            picture.load()
            picture = ImageOps.exif_transpose(picture)
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise SampleError(f"the picture cannot be decoded: {error}") from None
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise SampleError(
            f"pictures of mode {picture.mode} (32 bits a pixel) have no known range; store 8 or 16"
        )
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(picture.convert("RGB"))


def fit_picture(picture: np.ndarray, config: ImageConfig) -> np.ndarray:
    """The picture as uint8 [size_px, size_px, 3], by `config.fit`; unchanged if it has that size."""
    size = config.size_px
    if picture.shape[:2] == (size, size):
        return picture
    image = Image.fromarray(picture)
    if config.fit == "crop":
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    elif config.fit == "pad":
        image = ImageOps.pad(image, (size, size), Image.Resampling.LANCZOS, color="black")
    else:
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(image)


def to_patches(picture: np.ndarray, patch_px: int) -> np.ndarray:
    """[H, W, 3] -> [H * W / patch_px^2, patch_px * patch_px * 3], patches in reading order."""
    rows, columns = picture.shape[0] // patch_px, picture.shape[1] // patch_px
    split = picture.reshape(rows, patch_px, columns, patch_px, 3).transpose(0, 2, 1, 3, 4)
    return split.reshape(rows * columns, -1)


def from_patches(patches: np.ndarray, patch_px: int) -> np.ndarray:
    """Inverse of `to_patches` for a square picture."""
    side = round(len(patches) ** 0.5)
    split = patches.reshape(side, side, patch_px, patch_px, 3).transpose(0, 2, 1, 3, 4)
    return split.reshape(side * patch_px, side * patch_px, 3)


def fit_patches(pictures: Sequence[np.ndarray], config: ImageConfig, seed: int) -> PatchTokenizer:
    """Codebook of pictures uint8 [size_px, size_px, 3]: the commonest patches as they are, so that flat
    areas stay flat, and k-means of the others.

    k-means sees every distinct patch once; with their counts, the background would take the codebook. It has
    fewer codes than asked when there are fewer distinct patches.
    """
    from sklearn.cluster import KMeans

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
    """(rows of uint8 [n, d] without repetition, in order of first occurrence; how often each occurs).

    Rows are told apart by 64-bit hashes, 20 times as fast as numpy's sort of whole rows. Two rows of one hash
    (a chance of 1e-7 among a million rows) would cost k-means one example.
    """
    keys = np.random.default_rng(0).integers(1, 2**63, patches.shape[1], np.uint64) | np.uint64(1)
    hashes = patches.astype(np.uint64) @ keys
    _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
    order = np.argsort(first)
    return patches[first[order]], counts[order]


def psnr_db(squared_error_sum: float, count: int) -> float:
    """Peak signal-to-noise ratio over `count` values of 0 .. 255."""
    return float("inf") if squared_error_sum == 0 else 10 * np.log10(_PEAK**2 * count / squared_error_sum)
