from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.kinds.patch_kmeans import (
    PatchConfig,
    PatchTokenizer,
    fit_patches,
)
from data_pipeline.tokenize.media.picture_grid import to_patches
from data_pipeline.tokenize.media.pictures import psnr_db
from data_pipeline.tokenize.registry import open_tokenizer, save_tokenizer
from tests.data_pipeline.raw_documents import picture

CONFIG = PatchConfig(size_px=16, patch_px=4, num_codes=40, num_verbatim=4)


def noisy(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-9, 10, (16, 16, 3))
    return np.clip(picture(seed) + noise, 0, 255).astype(np.uint8)


PICTURES = [noisy(seed) for seed in range(60)]
TOKENIZER = fit_patches(PICTURES, CONFIG, seed=1)


def test_each_patch_gets_the_nearest_code() -> None:
    patches = to_patches(noisy(99), 4).astype(np.int64)
    naive = [int(((TOKENIZER.codebook.astype(np.int64) - patch) ** 2).sum(1).argmin()) for patch in patches]
    assert TOKENIZER.encode(noisy(99)).tolist() == naive


def test_large_patches_are_as_exact() -> None:
    """Beyond 2^24 float32 would round distances: two codes that differ by one grey level are told apart."""
    config = PatchConfig(size_px=16, patch_px=16, num_codes=2, num_verbatim=2)
    codebook = np.full((2, 768), 255, np.uint8)
    codebook[1, 0] = 254
    tokenizer = PatchTokenizer(config, codebook)
    assert [tokenizer.encode(tokenizer.decode(np.array([code]))).item() for code in (0, 1)] == [0, 1]


def test_codes_decode_to_themselves() -> None:
    codes = np.arange(16)
    assert TOKENIZER.encode(TOKENIZER.decode(codes)).tolist() == codes.tolist()


def test_round_trip_is_close() -> None:
    errors = [TOKENIZER.decode(TOKENIZER.encode(pixels)).astype(float) - pixels for pixels in PICTURES]
    quality = psnr_db(sum((error**2).sum() for error in errors), sum(error.size for error in errors))
    # 27 colours of patch, 40 codes to hold them; what is left is the noise of +-9: 33.6 dB measured
    assert quality > 32


def test_commonest_patches_are_kept_as_they_are() -> None:
    flat = np.full((16, 16, 3), 7, np.uint8)
    tokenizer = fit_patches([flat, *PICTURES[:5]], CONFIG, seed=1)
    assert (tokenizer.decode(tokenizer.encode(flat)) == flat).all()
    assert (tokenizer.codebook[0] == 7).all()


def test_fitting_is_deterministic_on_any_number_of_threads(tmp_path: Path) -> None:
    with threadpool_limits(2):
        again = fit_patches(PICTURES, CONFIG, seed=1)
    assert (again.codebook == TOKENIZER.codebook).all()
    assert again.fingerprint == TOKENIZER.fingerprint
    assert fit_patches(PICTURES, CONFIG, seed=2).fingerprint != TOKENIZER.fingerprint
    save_tokenizer(tmp_path, "image", "patch_kmeans", TOKENIZER)
    assert open_tokenizer(tmp_path, "image").fingerprint == TOKENIZER.fingerprint


def test_fewer_distinct_patches_than_codes() -> None:
    tokenizer = fit_patches([picture(0)], CONFIG, seed=1)
    assert tokenizer.size == len({patch.tobytes() for patch in to_patches(picture(0), 4)})
    assert (tokenizer.decode(tokenizer.encode(picture(0))) == picture(0)).all()
    with pytest.raises(ConfigError, match="no picture to fit"):
        fit_patches([], CONFIG, seed=1)
