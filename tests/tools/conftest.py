"""A small depth-routed run over images of 4 x 4 patches, trained once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS
from data_pipeline.tokenize.kinds.patch_kmeans import PatchConfig, PatchTokenizer
from data_pipeline.tokenize.registry import save_tokenizer
from tests.e2e.warm import train
from tests.pretrain.tiny_data import VOCABULARY, document, part, tiny_run, write_tokens
from tests.toml_text import toml_text

SIDE = 4
DEPTH = {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold", "dense_frac": 0.1, "ramp_frac": 0.3}


def image_tokenizer() -> PatchTokenizer:
    """Codes of 4 x 4 pixels, each of one grey."""
    codes = VOCABULARY.sizes["image"]
    config = PatchConfig(size_px=4 * SIDE, patch_px=4, num_codes=codes, num_verbatim=0)
    return PatchTokenizer(config, np.repeat(np.arange(codes, dtype=np.uint8) * 15, 48).reshape(codes, 48))


def with_whole_image(rng: np.random.Generator) -> np.ndarray:
    codes = rng.integers(0, VOCABULARY.sizes["image"], SIDE * SIDE) + VOCABULARY.start("image")
    return np.concatenate([[BOS], part("text", 1, rng), [BOI], codes, [EOI], part("speech", 2, rng), [EOS]])


def write_data(folder: Path) -> None:
    """Every second document with a whole image, the others as in tiny data."""
    tokenizer = image_tokenizer()
    save_tokenizer(folder / "tokenizers" / "image", "image", "patch_kmeans", tokenizer)
    for name, count, seed in (("train", 100, 1), ("heldout", 40, 2)):
        rng = np.random.default_rng(seed)
        makers = (with_whole_image, document)
        write_tokens(folder / name, [makers[i % 2](rng) for i in range(count)])
        path = folder / name / "manifest.json"
        manifest = json.loads(path.read_text())
        manifest["tokenizers"]["image"]["fingerprint"] = tokenizer.fingerprint
        path.write_text(json.dumps(manifest))


def write_run(folder: Path, **model: Any) -> Path:
    """folder/tiny.toml, of a run over folder/data with these keys of [model]."""
    values = tiny_run(folder / "data", folder / "runs")
    values["model"] |= {"num_layers": 2, **model}
    (folder / "tiny.toml").write_text(toml_text(values))
    return folder / "tiny.toml"


def trained(folder: Path, **model: Any) -> Path:
    """The TOML file of a run that is done."""
    write_data(folder / "data")
    run = write_run(folder, **model)
    train([str(run)], folder / "out")
    return run


@pytest.fixture(scope="session")
def depth_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN.toml of a run that routes images by thresholds, and speech by top_k, in both layers."""
    depth = {"image": DEPTH, "speech": DEPTH | {"rule": "top_k", "mean_ratio": 0.75}}
    return trained(tmp_path_factory.mktemp("depth"), depth=depth)
