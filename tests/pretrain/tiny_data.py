"""Token shards and a run small enough to train in a test, with something to learn across modalities."""

from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.shards.vocabulary import BOS, DELIMITERS, EOS, SPECIAL_TOKENS, TEXT, Vocabulary
from tests.toml_text import toml_text

VOCABULARY = Vocabulary(sizes={"text": 24, "image": 16, "speech": 12})
CONTEXT_TOKENS = 64


def part(modality: str, topic: int, rng: np.random.Generator) -> np.ndarray:
    """3 to 10 ids that walk from the topic, so that one part of a document tells about the others."""
    start = VOCABULARY.start(modality) + (len(SPECIAL_TOKENS) if modality == TEXT else 0)
    size = VOCABULARY.sizes[modality] - (len(SPECIAL_TOKENS) if modality == TEXT else 0)
    length = int(rng.integers(3, 11))
    ids = start + (topic * 3 + np.arange(length) * (1 + topic % 3)) % size
    opening, closing = DELIMITERS.get(modality, (None, None))
    return ids if opening is None else np.concatenate([[opening], ids, [closing]])


def document(rng: np.random.Generator) -> np.ndarray:
    """A random subset of the modalities, in random order, about one topic."""
    topic = int(rng.integers(0, 8))
    names = rng.permutation(VOCABULARY.modalities)[: rng.integers(1, 4)]
    return np.concatenate([[BOS], *(part(str(name), topic, rng) for name in names), [EOS]])


def write_tokens(folder: Path, documents: list[np.ndarray], *, fingerprint: str = "tiny") -> None:
    """`documents` as a folder of token shards, 40 a shard."""
    write_token_folder(folder, documents, VOCABULARY, documents_per_shard=40, fingerprint=fingerprint)


def write_tiny_data(folder: Path) -> None:
    """folder/train of 200 documents and folder/heldout of 60."""
    for name, count, seed in (("train", 200, 1), ("heldout", 60, 2)):
        rng = np.random.default_rng(seed)
        write_tokens(folder / name, [document(rng) for _ in range(count)])


def tiny_run(data: Path, runs_dir: Path) -> dict[str, Any]:
    """Values of a RunConfig: 24 steps of 4 sequences, logged, evaluated and saved along the way."""
    return {
        "name": "tiny",
        "seed": 3,
        "total_tokens": 24 * 4 * CONTEXT_TOKENS,
        "tokens_per_step": 4 * CONTEXT_TOKENS,
        "runs_dir": str(runs_dir),
        "model": {
            "num_layers": 1,
            "d_model": 32,
            "num_heads": 2,
            "ffn_hidden": 64,
            "context_tokens": CONTEXT_TOKENS,
            "vocab_tokens": VOCABULARY.size,
            "towers": {name: name for name in VOCABULARY.modalities},
        },
        "data": {"train": [{"path": str(data / "train")}], "heldout": str(data / "heldout")},
        "optimizer": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 4}},
        "parallel": {"micro_batch_sequences": 2},
        "every_steps": {"log": 3, "eval": 8, "checkpoint": 5},
        "evaluate": {"heldout_sequences": 6, "conditional_documents": 2},
    }


def write_tiny_comparison(data: Path, folder: Path, *, steps: int = 24, **base_changes: Any) -> Path:
    """folder/compare.toml: `tiny_run` with one tower and with three, on two seeds; runs go to folder/runs."""
    base = tiny_run(data, folder / "runs") | base_changes
    base["total_tokens"] = steps * base["tokens_per_step"]
    base["parallel"]["micro_batch_sequences"] = 1
    (folder / "base.toml").write_text(toml_text(base))
    path = folder / "compare.toml"
    towers = {name: "all" for name in VOCABULARY.modalities}
    values = {
        "name": "tiny_compare",
        "question": "Does it run?",
        "base": "base.toml",
        "baseline": "dense",
        "vary": ["model.towers"],
        "seeds": [3, 4],
        "concurrent_runs": 2,
    }
    path.write_text(toml_text(values | {"arms": {"dense": {"model": {"towers": towers}}, "mot": {}}}))
    return path
