"""What a step costs, over all ranks; that rows survive kills is in tests/e2e/test_train_resume.py."""

from pathlib import Path

import pytest

from data_pipeline.toml_config import validate
from parallel.testing import run_on_ranks
from parallel.world import start
from pretrain import build
from pretrain.config import RunConfig
from pretrain.meter import Meter
from pretrain.metrics import read_rows
from pretrain.models.inputs import build_inputs
from pretrain.run_dir import RunDir
from pretrain.state import TrainState
from tests.pretrain.tiny_data import CONTEXT_TOKENS, tiny_run, write_tiny_data


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    write_tiny_data(tmp_path)
    return validate(RunConfig, tiny_run(tmp_path, tmp_path / "runs"), source="run.toml")


def sums_of_two_steps(config: RunConfig) -> dict:
    """Sums of the second step, after two rows were written by rank 0."""
    world = start(config.parallel)
    engine, stream = build.engine(config, world), build.stream(config)
    state = TrainState.start(stream.start())
    run = RunDir.open(config, world_size=world.world_size, command=["test"]) if world.rank == 0 else None
    with (
        build.loader(config, stream, world, state.stream) as loader,
        Meter(config, world, run, state) as meter,
    ):
        sums = {}
        for step in range(2):
            batch = loader.next_step()
            with meter.timing():
                inputs = [build_inputs(each, config.model) for each in batch.micro_batches]
                result = engine.train_step(inputs, step)
            sums = meter.sums(batch, inputs, result)
            state = meter.log(state.advance(batch, sums), result, {"eval/loss": 1.0})
    return dict(sums)


def test_sums_do_not_depend_on_the_layout(config: RunConfig, tmp_path: Path) -> None:
    (alone,) = run_on_ranks(sums_of_two_steps, 1, config)
    apart = validate(RunConfig, {**config.model_dump(), "name": "apart"}, source="run.toml")
    first, second = run_on_ranks(sums_of_two_steps, 2, apart)
    timed = {"step_s", "wait_s", "bad_documents"}
    for name in alone.keys() - timed:
        # fp32 sums in another order: 1e-7 measured.
        assert first[name] == pytest.approx(alone[name], rel=1e-5), name
        assert first[name] == second[name], name
    assert alone["tokens"] == config.tokens_per_step == 4 * CONTEXT_TOKENS


def test_a_row_a_logged_step_with_what_the_loop_adds(config: RunConfig) -> None:
    run_on_ranks(sums_of_two_steps, 1, config)
    rows = read_rows(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[1]["tokens"] == 2 * config.tokens_per_step
    assert rows[1]["eval/loss"] == 1.0
    assert rows[1]["compute/train_flops"] > rows[0]["compute/train_flops"] > 0
    assert 0 < rows[1]["speed/mfu_frac"] < 2  # of a peak that was itself measured
    assert (
        len(rows[1]["data/fingerprint"]) == 16 and rows[0]["data/fingerprint"] != rows[1]["data/fingerprint"]
    )
