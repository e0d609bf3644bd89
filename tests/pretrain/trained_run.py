"""A dense run of two tensor-parallel ranks with a checkpoint, made without its loop."""

from pathlib import Path
from typing import Any

import torch

from data_pipeline.files.toml_config import validate
from parallel import world
from parallel.testing import run_on_ranks
from pretrain.checkpoint.save import CheckpointWriter
from pretrain.config import RunConfig
from pretrain.models.inputs import build_inputs
from pretrain.train import build
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data

DENSE = dict.fromkeys(VOCABULARY.modalities, "all")
STEP = 2


def run_values(folder: Path) -> dict[str, Any]:
    values = tiny_run(folder / "data", folder / "runs")
    values["name"] = "dense"
    values["model"] |= {"towers": DENSE, "norm_placement": "pre", "num_layers": 2}
    values["parallel"] |= {"tp": 2, "zero_stage": 2}
    values["optimizer"] |= {"ema_decay": 0.5}
    return values


def _train_and_save(values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A few steps on two tensor-parallel ranks and a checkpoint; each rank's parameters at its end."""
    config = validate(RunConfig, values, source="test")
    w = world.start(config.parallel)
    engine, data = build.engine(config, w), training_stream(config)
    with build.loader(config, data, w, data.start()) as loader:
        for step in range(STEP):
            batch = loader.next_step()
            engine.train_step([build_inputs(each, config.model) for each in batch.micro_batches], step)
    with CheckpointWriter(config.run_dir / "checkpoints", engine, w, keep=2) as writer:
        writer.save(STEP, {})
    return {n.removeprefix("decoder."): p.detach() for n, p in engine.deepspeed.module.named_parameters()}


def write_trained_run(folder: Path) -> list[dict[str, torch.Tensor]]:
    """folder/data and folder/runs/dense; returns what each rank held: name in the decoder -> its part."""
    write_tiny_data(folder / "data")
    held = run_on_ranks(_train_and_save, 2, run_values(folder))
    write_config(folder)
    return held


def write_config(folder: Path) -> None:
    """The run's resolved config, with the folder's own paths."""
    config = validate(RunConfig, run_values(folder), source="test")
    (config.run_dir / "config.resolved.json").write_text(config.model_dump_json())
