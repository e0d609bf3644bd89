"""The tiny data and run with images as vectors, which text tells of and which tell of text."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.shards.vocabulary import VectorFormat, Vocabulary
from tests.pretrain import tiny_data

FEATURES = 4
VOCABULARY = Vocabulary(
    sizes={"text": 24, "image": 1, "speech": 12},
    vectors={"image": VectorFormat(features=FEATURES, dtype="float16", mean=0.5, std=2.0)},
)
NUM_VECTORS = 6
"""Vectors of an image."""


def document(rng: np.random.Generator) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """(ids, vectors) of a text of one of 8 topics, or of an image of it, or of both in either order, or of a
    text and of speech."""
    topic = int(rng.integers(0, 8))
    names = [["text"], ["image"], ["text", "image"], ["image", "text"], ["text", "speech"]][rng.integers(5)]
    ids = [np.array([VOCABULARY.bos])]
    for name in names:
        part = tiny_data.part(name, topic, rng)
        if name == "image":
            opening, closing = VOCABULARY.delimiters("image")
            codes = [VOCABULARY.first_code("image")] * NUM_VECTORS
            part = np.array([opening, *codes, closing])
        elif name == "speech":  # its ids begin lower than those of the other data
            moved = tiny_data.VOCABULARY.start("speech") - VOCABULARY.start("speech")
            part = np.concatenate([part[:1], part[1:-1] - moved, part[-1:]])
        ids.append(part)
    waves = np.sin((topic + 1) * np.arange(NUM_VECTORS)[:, None] + np.arange(FEATURES))
    image = VOCABULARY.vectors["image"].stored(waves + 0.1 * rng.standard_normal(waves.shape))
    whole = np.concatenate([*ids, [VOCABULARY.eos]])
    return whole, {"image": image[: NUM_VECTORS * names.count("image")]}


def write_tiny_vectors(folder: Path) -> None:
    """folder/train of 200 documents and folder/heldout of 60."""
    for name, count, seed in (("train", 200, 1), ("heldout", 60, 2)):
        rng = np.random.default_rng(seed)
        ids, vectors = zip(*(document(rng) for _ in range(count)), strict=True)
        write_token_folder(folder / name, ids, VOCABULARY, documents_per_shard=40, vectors=vectors)


def vectors_run(data: Path, runs_dir: Path, **image: Any) -> dict[str, Any]:
    """Values of a RunConfig as of `tiny_run`. `image`: keys of model.vectors.image."""
    values = tiny_data.tiny_run(data, runs_dir)
    values["model"] |= {
        "vocab_tokens": VOCABULARY.size,
        "vectors": {"image": {"features": FEATURES, **image}},
    }
    values["loss_weights"] = {"image": 5.0}
    return values
