"""The parts of a run follow its config."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import validate
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.config import RunConfig
from pretrain.evaluation.losses import conditional_losses, heldout_losses
from pretrain.train import build
from pretrain.train.schedule import schedule_factor
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data


def _config(folder: Path, **changes: Any) -> RunConfig:
    return validate(RunConfig, tiny_run(folder, folder / "runs") | changes, source="test")


def _steps(folder: Path) -> list[Any]:
    config = _config(folder)
    w = world.start(ParallelConfig())
    engine, data = build.engine(config, w), training_stream(config)
    found = []
    with build.loader(config, data, w, data.start()) as loader:
        for step in range(2):
            batch = loader.next_step()
            result = engine.train_step(batch.inputs, step)
            samples = [names for each in batch.micro_batches for names in each.samples]
            towers = sorted(result.grad_norm_by_group)
            found.append((len(batch.inputs), result.learning_rate, towers, result.weight, samples))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_engine_and_loader_split_a_step_alike(tmp_path: Path, ranks: int):
    write_tiny_data(tmp_path)
    config = _config(tmp_path)
    (alone,) = run_on_ranks(_steps, 1, tmp_path)
    for rank, found in enumerate(run_on_ranks(_steps, ranks, tmp_path)):
        for step, (passes, learning_rate, towers, weight, samples) in enumerate(found):
            assert samples == alone[step][-1][rank::ranks]
            assert passes == 4 // (2 * ranks)
            factor = schedule_factor(step, config.num_steps, config.optimizer.schedule)
            assert learning_rate == config.optimizer.learning_rate * factor
            assert towers == sorted((*VOCABULARY.modalities, "shared"))
            assert 0.8 * config.tokens_per_step < weight <= config.tokens_per_step


def _three_steps(folder: Path, layout: dict[str, Any]) -> tuple[list[Any], dict[str, float], list[str]]:
    values = tiny_run(folder, folder / "runs")
    values["model"]["num_layers"] = 2
    values["parallel"] |= layout
    config = validate(RunConfig, values, source="test")
    w = world.start(config.parallel)
    engine, data, steps, samples = build.engine(config, w), training_stream(config), [], []
    with build.loader(config, data, w, data.start()) as loader:
        for step in range(3):
            batch = loader.next_step()
            samples += [str(each.samples) for each in batch.micro_batches]
            result = engine.train_step(batch.inputs, step)
            steps += [*result.stats, result.grad_norm, *result.grad_norm_by_group.values()]
    heldout = build.heldout(config, w)
    return steps, heldout_losses(engine, heldout) | conditional_losses(engine, heldout), samples


def test_no_layout_changes_a_step_or_an_evaluation(tmp_path: Path):
    write_tiny_data(tmp_path)
    (steps, evaluation, _), *_ = run_on_ranks(_three_steps, 1, tmp_path, {})
    # 6 held-out sequences on 2 data-parallel ranks, 2 a micro-batch: one of them gets an empty sequence.
    for ranks, layout in ((4, {"pp": 2, "tp": 2}), (4, {"pp": 2}), (2, {"tp": 2, "zero_stage": 3})):
        found = run_on_ranks(_three_steps, ranks, tmp_path, layout)
        assert all(each[:2] == found[0][:2] for each in found)
        # Measured 2e-6 on norms, 1e-7 on losses, 7e-7 on gains, which are differences.
        assert found[0][0] == pytest.approx(steps, rel=1e-5), layout
        assert found[0][1] == pytest.approx(evaluation, rel=1e-5, abs=1e-5), layout
        tp, pp = layout.get("tp", 1), layout.get("pp", 1)
        dp = ranks // (tp * pp)
        for rank, (_, _, samples) in enumerate(found):
            assert (samples == found[0][2]) == (rank // tp % dp == 0)


def _heldout_counts(folder: Path, heldout: bool) -> tuple[int, int]:
    config = _config(folder)
    if not heldout:
        config = config.model_copy(update={"data": config.data.model_copy(update={"heldout": None})})
    built = build.heldout(config, world.start(ParallelConfig()))
    return len(built.documents), len(built.own)


def test_a_run_without_held_out_data_evaluates_nothing(tmp_path: Path):
    write_tiny_data(tmp_path)
    assert run_on_ranks(_heldout_counts, 1, tmp_path, False) == [(0, 0)]
    ((batches, directions),) = run_on_ranks(_heldout_counts, 1, tmp_path, True)
    assert batches == 3 and directions == 6
