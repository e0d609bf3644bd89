"""What a step of the training loop is given, and when evaluations are due; tests/e2e trains through it."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig
from pretrain.models.inputs import build_inputs
from pretrain.train.loop import inputs_of_step, is_due
from pretrain.train.state import TrainState
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.train.test_state import BATCH, START


def _config(folder: Path) -> RunConfig:
    return validate(RunConfig, tiny_run(folder, folder), source="test")


def test_routers_know_their_thresholds_and_the_share_of_the_run_that_is_done(tmp_path: Path) -> None:
    config, model = _config(tmp_path), tiny_config(MOT)
    batch = replace(BATCH, inputs=(build_inputs(random_batch(model), model),))
    state = replace(TrainState.start(START), step=6, thresholds={"blocks.1.depth.image": 0.25})
    (inputs,) = inputs_of_step(config, batch, state, cast(Any, None))  # without images ranks tell nothing
    assert config.num_steps == 24 and inputs.routing_state.progress == 0.25
    assert inputs.routing_state.thresholds == state.thresholds


def test_what_is_due_every_few_steps_is_due_after_the_last_one_too(tmp_path: Path) -> None:
    config, start = _config(tmp_path), TrainState.start(START)
    due = [step for step in range(1, 25) if is_due(config, replace(start, step=step), 7)]
    assert due == [7, 14, 21, 24]
