"""What a spike does to a run; tests/e2e/test_train_spikes.py trains through spikes."""

import json
import math
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import validate
from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.checkpoint.save import CheckpointWriter
from pretrain.config import RunConfig
from pretrain.run_dir import RunDir
from pretrain.run_identity import RunIdentity
from pretrain.train.finite import NonFiniteError
from pretrain.train.spike_steps import leave_out, roll_back, spike_of, tell
from pretrain.train.spikes import SpikeError
from pretrain.train.state import TrainState
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.toy_run import start
from tests.pretrain.train.test_state import BATCH, START

COSTS = {"steps": 1.0, "tokens": 256.0, "flops": 1e6, "step_s": 0.5, "wait_s": 0.25, "fill": 1.0}
DEPTH = {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold", "ramp_frac": 0.5}}


def _config(folder: Path, **changes: object) -> RunConfig:
    return validate(RunConfig, tiny_run(folder, folder) | changes, source="test")


def _judge(folder: str) -> list[str | None]:
    """What is said of a usual step, a leap and a step that is not finite, by each on_spike."""
    w = world.start(ParallelConfig())
    said: list[str | None] = []
    for on_spike in ("stop", "skip"):
        rule = {"loss_factor": 2.0, "window": 1}
        config = _config(Path(folder), on_spike=on_spike, spike=rule)
        state = TrainState.start(START).advance(BATCH, COSTS, recent=((3.0, 1.0),))
        for nats in (30.0, 90.0, math.nan):
            applied = on_spike == "stop" or nats == 30.0
            result = StepResult([nats, 0, 0, 10, 0, 0], 10, 1.0, {"text": 1.0}, 1e-3, applied=applied)
            try:
                said.append(spike_of(config, state, result, (), w))
            except (SpikeError, NonFiniteError) as error:
                said.append(f"{type(error).__name__}: {error}"[:50])
    return said


def test_a_spike_ends_the_run_or_is_told(tmp_path: Path) -> None:
    (said,) = run_on_ranks(_judge, 1, str(tmp_path))
    stop, skip = said[:3], said[3:]
    assert stop[0] is skip[0] is None
    assert str(stop[1]).startswith("SpikeError: step 2 is a spike: its loss of 9")
    assert str(stop[2]).startswith("NonFiniteError: step 2 is not finite")
    assert str(skip[1]).startswith("its loss of 9 is more than 2 times")
    assert str(skip[2]).startswith("its loss or gradient is not finite; every loss is finite, but")


def test_routers_keep_their_thresholds_and_follow_the_ratio(tmp_path: Path) -> None:
    values = tiny_run(tmp_path, tmp_path)
    values["model"] |= {"num_layers": 2, "depth": DEPTH}
    config = validate(RunConfig, values, source="test")
    name = "blocks.1.depth.image"
    before = TrainState.start(START).advance(BATCH, COSTS, None, {name: 0.25}, {name: 0.9})
    after = leave_out(config, before, BATCH, COSTS, "so")
    assert after.thresholds[name] == 0.25 and after.shares[name] < 0.9  # ratios fall in these steps
    assert (after.step, after.spikes[0].why, after.total["lost_steps"]) == (2, "so", 1.0)


def _without_checkpoint(folder: str) -> str:
    w, engine = start()
    config = _config(Path(folder))
    state = TrainState.start(START).skip(BATCH, COSTS, "so", {}, {})
    with CheckpointWriter(config.run_dir / "checkpoints", engine, w, keep=2) as checkpoints:
        try:
            roll_back(config, engine, checkpoints, w, RunIdentity("ab", ""), state)
        except SpikeError as error:
            return str(error)
    return ""


def test_a_run_without_a_checkpoint_has_nothing_to_go_back_to(tmp_path: Path) -> None:
    (said,) = run_on_ranks(_without_checkpoint, 1, str(tmp_path))
    assert (
        said.startswith("step 1 is a spike: so. There is no checkpoint yet")
        and "every_steps.checkpoint" in said
    )


def test_a_spike_is_told_and_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunDir.open(_config(tmp_path), world_size=1, command=[])
    state = TrainState.start(START).skip(BATCH, COSTS, "so", {}, {})
    tell(state, None)
    tell(state, run)
    tell(state.go_back(TrainState.start(START)), run)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "warning: step 1 is a spike: so; its update is left out"
    assert "; back to the checkpoint of step 0, and on with the data behind" in second
    assert json.loads((run.path / "record.json").read_text())["spikes"] == {
        "events": [{"step": 1, "why": "so", "back_to": 0}],
        "train/lost_steps": 1,
        "train/lost_tokens": 256,
        "compute/lost_flops": 1e6,
        "time/lost_s": 0.75,
    }
