import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.vocabulary import VectorFormat
from data_pipeline.tokenize.kinds.patches import TOKENIZER, PixelConfig, PixelPatches, fit_pixels
from data_pipeline.tokenize.registry import open_tokenizer, save_tokenizer
from data_pipeline.tokenize.tokenizer import vector_format
from tests.data_pipeline.raw_documents import picture

CONFIG = PixelConfig(size_px=16, patch_px=4)
PICTURES = [picture(seed) for seed in range(9)]


def test_a_picture_is_its_pixels_and_comes_back_to_the_bit() -> None:
    tokenizer = fit_pixels(PICTURES, CONFIG, seed=1)
    vectors = tokenizer.encode(PICTURES[3])
    assert vectors.dtype == np.uint8 and vectors.shape == (CONFIG.content_codes, 48) == (16, 48)
    assert (vectors[6].reshape(4, 4, 3) == PICTURES[3][4:8, 8:12]).all()
    assert (tokenizer.decode(vectors) == PICTURES[3]).all() and tokenizer.size == 1


def test_a_model_sees_pixels_of_mean_0_and_deviation_1() -> None:
    tokenizer = fit_pixels(iter(PICTURES), CONFIG, seed=1)
    pixels = np.stack(PICTURES).astype(np.float64)
    assert tokenizer.mean == pytest.approx(pixels.mean(), rel=1e-12)
    assert tokenizer.std == pytest.approx(pixels.std(), rel=1e-12)
    of = vector_format(tokenizer)
    assert of == VectorFormat(features=48, dtype="uint8", mean=tokenizer.mean, std=tokenizer.std)
    assert fit_pixels(PICTURES[::-1], CONFIG, seed=2).fingerprint == tokenizer.fingerprint
    assert fit_pixels(PICTURES[1:], CONFIG, seed=1).fingerprint != tokenizer.fingerprint


def test_grey_pictures_have_a_channel() -> None:
    config = PixelConfig(size_px=16, patch_px=4, channels=1)
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), (255, 0, 0), np.uint8)).save(file, "PNG")
    red = TOKENIZER.read(file.getvalue(), config)
    assert (red == 76).all(), "ITU-R 601 luma: 0.299 * 255"
    tokenizer = fit_pixels([red, red * 0], config, seed=1)
    assert tokenizer.encode(red).shape == (16, 16) and tokenizer.vectors.features == 16
    assert (tokenizer.decode(tokenizer.encode(red)) == red).all() and tokenizer.mean == 38
    assert tokenizer.std == 38


def test_pictures_of_one_colour_have_no_deviation() -> None:
    with pytest.raises(ConfigError, match="no picture with two colours to fit"):
        fit_pixels([np.full((16, 16, 3), 7, np.uint8)] * 2, CONFIG, seed=1)


def test_it_is_saved_and_opened_and_a_change_is_seen(tmp_path: Path) -> None:
    tokenizer = fit_pixels(PICTURES, CONFIG, seed=1)
    save_tokenizer(tmp_path, "image", "patches", tokenizer)
    opened = open_tokenizer(tmp_path, "image")
    assert opened == tokenizer and isinstance(opened, PixelPatches)
    saved = json.loads((tmp_path / "pixels.json").read_text())
    (tmp_path / "pixels.json").write_text(json.dumps(saved | {"mean": 1.0}))
    with pytest.raises(ConfigError, match="its files were changed after they were saved"):
        open_tokenizer(tmp_path, "image")
    for damaged in ("", "{", "[]", '{"mean": 1.0}', '{"mean": [], "std": 1.0}'):
        (tmp_path / "pixels.json").write_text(damaged)
        with pytest.raises(ConfigError, match=r"pixels\.json cannot be read"):
            open_tokenizer(tmp_path, "image")
