import pytest

from data_pipeline.toml_config import validate
from parallel.testing import run_on_ranks
from parallel.world import start
from pretrain import build
from pretrain.config import RunConfig
from tests.pretrain.tiny_data import tiny_run, write_tiny_data


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return validate(RunConfig, tiny_run(folder, folder / "runs"), source="run.toml")


def parts_of_a_run(config: RunConfig) -> tuple:
    world = start(config.parallel)
    engine = build.engine(config, world)
    stream = build.stream(config)
    with build.loader(config, stream, world, stream.start()) as loader:
        sequences = [name for batch in loader.next_step().micro_batches for name in batch.samples]
    heldout = build.heldout(config, world)
    return (
        engine.accumulation_steps,
        engine.learning_rate_at(config.optimizer.schedule.warmup_steps - 1),
        sequences,
        len(heldout.documents),
    )


def test_parts_fit_the_layout(config: RunConfig) -> None:
    """4 sequences a step in passes of 2: two passes on one rank, one on each of two."""
    (alone,) = run_on_ranks(parts_of_a_run, 1, config)
    first, second = run_on_ranks(parts_of_a_run, 2, config)
    assert (alone[0], first[0], second[0]) == (2, 1, 1)
    # Warm-up ends at the rate of the config.
    assert alone[1] == first[1] == pytest.approx(config.optimizer.learning_rate)
    # Rank r of two takes positions r, r + 2 of the same global batch.
    assert first[2] == alone[2][0::2] and second[2] == alone[2][1::2]
    assert first[3] == second[3] > 0


def test_a_run_without_held_out_data_evaluates_nothing(config: RunConfig) -> None:
    bare = config.model_copy(update={"data": config.data.model_copy(update={"heldout": None})})
    (result,) = run_on_ranks(parts_of_a_run, 1, bare)
    assert result[3] == 0
