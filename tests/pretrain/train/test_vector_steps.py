"""Noise of a training step and the share of images in its objective."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import validate
from parallel import world
from parallel.testing import run_on_ranks
from pretrain.config import RunConfig
from pretrain.evaluation.losses import conditional_losses, heldout_losses
from pretrain.models import modality_sums
from pretrain.train import build
from pretrain.train.vector_steps import image_scales, with_images
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_vectors import vectors_run, write_tiny_vectors


def config_of(folder: Path, **changes: Any) -> RunConfig:
    values = vectors_run(folder, folder / "runs", condition_max_time=0.5) | changes
    values["model"] |= {"num_layers": 2, "vocab_tokens": 38}
    return validate(RunConfig, values, source="test")


def test_a_scale_makes_a_weighted_mean_of_a_sum() -> None:
    assert image_scales({"image": 5.0, "video": 1.0}, 30.0, [6.0, 0.0]) == {"image": 25.0, "video": 0.0}


def _steps(folder: Path, layout: dict[str, Any], changes: dict[str, Any]) -> tuple[list[float], Any]:
    config = config_of(folder, parallel={"micro_batch_sequences": 2, **layout}, **changes)
    w = world.start(config.parallel)
    engine, data, found = build.engine(config, w), training_stream(config), []
    with build.loader(config, data, w, data.start()) as loader:
        for step in range(2):
            batch = loader.next_step()
            inputs = with_images(config, batch.inputs, batch.sequences, step, w)
            result = engine.train_step(inputs, step)
            found += [*result.stats, result.grad_norm, result.weight]
    heldout = build.heldout(config, w)
    return found, heldout_losses(engine, heldout) | conditional_losses(engine, heldout)


def test_no_layout_changes_a_step_or_an_evaluation_of_images(tmp_path: Path) -> None:
    write_tiny_vectors(tmp_path)
    ((steps, evaluation), *_) = run_on_ranks(_steps, 1, tmp_path, {}, {})
    for ranks, layout in ((2, {}), (2, {"pp": 2})):
        for found, losses in run_on_ranks(_steps, ranks, tmp_path, layout, {}):
            assert found == pytest.approx(steps, rel=2e-5)  # fp32: 1e-6 measured
            assert losses == pytest.approx(evaluation, rel=2e-5, abs=1e-5)  # a gain may be 0
    modalities = ("text", "image", "speech")
    sums = modality_sums.unpack(steps[:6], modalities)
    assert steps[7] == sums["text"].weight + sums["speech"].weight
    whole = {name: evaluation[f"eval/loss/{name}"] for name in modalities}
    assert min(whole["text"], whole["speech"]) < evaluation["eval/loss"] - 5 * whole["image"]
    assert evaluation["eval/loss"] - 5 * whole["image"] < max(whole["text"], whole["speech"])
    quarters = [evaluation[f"eval/loss/image/time_{quarter}"] for quarter in range(1, 5)]
    assert min(quarters) <= whole["image"] <= max(quarters)


def test_a_step_that_predicts_no_id_divides_by_images(tmp_path: Path) -> None:
    write_tiny_vectors(tmp_path)
    silent = {"loss_weights": {"text": 0.0, "speech": 0.0, "image": 1.0}}
    ((steps, _),) = run_on_ranks(_steps, 1, tmp_path, {}, silent)
    sums = modality_sums.unpack(steps[:6], ("text", "image", "speech"))
    assert steps[7] == sums["image"].weight > 0 and steps[6] > 0
