"""The directory of a run that read its data and trained nothing: rows hold fingerprints of what was read."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.toml_config import validate
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import write_token_folder
from data_pipeline.stream.fingerprint import chain
from data_pipeline.stream.loader import Loader
from pretrain.config import RunConfig
from pretrain.run_files import CONFIG, METRICS
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_data import VOCABULARY, document, tiny_run


def write_masked_data(folder: Path, every: int = 3) -> None:
    """folder/train of 90 documents in shards of 40; some ids of `every` third, fourth ... one are context."""
    rng = np.random.default_rng(1)
    documents = [document(rng) for _ in range(90)]
    masked = {number: np.array([[1, 3]]) for number in range(0, 90, every)}
    write_token_folder(folder / "train", documents, VOCABULARY, documents_per_shard=40, masked=masked)
    TokenSource.open(folder / "train")


def read_run(data: Path, runs_dir: Path, *, steps: int, dp_size: int = 2, **changes: Any) -> Path:
    """The directory of a run that made `steps` steps on `dp_size` ranks, with a row for every second one."""
    values = tiny_run(data, runs_dir) | changes
    values["data"] = {"train": [{"path": str(data / "train")}]}
    config = validate(RunConfig, values, source="test")
    config.run_dir.mkdir(parents=True)
    (config.run_dir / CONFIG).write_text(config.model_dump_json())
    stream = training_stream(config)
    loaders = [
        Loader(stream, dp_rank=rank, dp_size=dp_size, micro_batch_sequences=1, prefetch_steps=0)
        for rank in range(dp_size)
    ]
    fingerprint, rows = 0, []
    for step in range(1, steps + 1):
        digest = sum(loader.next_step().digest for loader in loaders) % (1 << 64)
        fingerprint = chain(fingerprint, digest, stream.sequences_per_step)
        if step % 2 == 0:
            rows.append({"step": step, "tokens": 0, "data/fingerprint": f"{fingerprint:016x}"})
    (config.run_dir / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config.run_dir
