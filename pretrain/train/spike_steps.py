"""What the training loop does about spikes (pretrain/train/spikes.py)."""

import sys
from collections.abc import Sequence
from dataclasses import asdict

from data_pipeline.stream.loader import StepBatch
from parallel.engine import Engine, StepResult
from parallel.world import World
from pretrain.checkpoint import restore
from pretrain.checkpoint.save import CheckpointWriter
from pretrain.config import RunConfig
from pretrain.metrics import Sums
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport, no_counts
from pretrain.run_dir import RunDir
from pretrain.run_files import CHECKPOINTS
from pretrain.run_identity import RunIdentity
from pretrain.train import depth_steps, spikes
from pretrain.train.finite import not_finite, require_finite
from pretrain.train.spikes import SpikeError
from pretrain.train.state import TrainState


def spike_of(
    config: RunConfig, state: TrainState, result: StepResult, inputs: Sequence[ModelInputs], world: World
) -> str | None:
    """Why the step that was made after `state` is a spike; None if it is none. All ranks call it and get the
    same. Raises NonFiniteError or SpikeError if the spike ends the run."""
    modalities, step = config.model.modalities, state.step + 1
    if config.on_spike == "stop":
        require_finite(result, inputs, modalities, step=step, world=world)
    why = spikes.leap_of(config, state.recent, result)
    assert config.on_spike == "stop" or result.applied == (why is None), (result.applied, why)
    if why is not None:
        why = "; ".join([why, *not_finite(result, inputs, modalities, world)])
        spikes.check_allowed(config, step, len(state.spikes) + 1, why)
    return why


def leave_out(config: RunConfig, state: TrainState, batch: StepBatch, sums: Sums, why: str) -> TrainState:
    """The state after a spike, whose update was not applied: it consumed `batch` and cost `sums`. Routers
    keep their thresholds, as after a step without a token."""
    return state.skip(batch, sums, why, *thresholds_after(config, state, no_counts(config.model)))


def thresholds_after(
    config: RunConfig, state: TrainState, report: RouterReport
) -> tuple[dict[str, float], dict[str, float]]:
    """Thresholds and target shares behind the step that is made after `state`, from the routers' report."""
    return depth_steps.thresholds_after(
        state.thresholds,
        state.shares,
        report,
        config.model,
        step=state.step + 1,
        num_steps=config.num_steps,
    )


def roll_back(
    config: RunConfig,
    engine: Engine,
    checkpoints: CheckpointWriter,
    world: World,
    run: RunIdentity,
    state: TrainState,
) -> TrainState:
    """Load the newest good checkpoint into the engine; returns its state, with the data and the costs of
    `state`, which is that after a spike. All ranks call it. Raises SpikeError if there is no checkpoint."""
    checkpoints.wait()
    restored = restore.restore(config.run_dir / CHECKPOINTS, engine, world, run)
    if restored is None:
        spike = state.spikes[-1]
        raise SpikeError(
            f"step {spike.step} is a spike: {spike.why}. There is no checkpoint yet that on_spike = "
            '"rollback" could go back to; lower every_steps.checkpoint or optimizer.learning_rate'
        )
    return state.go_back(TrainState.from_json(restored.state))


def tell(state: TrainState, run: RunDir | None) -> None:
    """Print the last spike of `state`, and record all of them with what they lost. `run`: None on ranks that
    say nothing, which are all but the first."""
    if run is None:
        return
    spike = state.spikes[-1]
    then = "its update is left out"
    if spike.back_to is not None:
        then = f"back to the checkpoint of step {spike.back_to}, and on with the data behind the spike"
    print(f"warning: step {spike.step} is a spike: {spike.why}; {then}", file=sys.stderr, flush=True)
    keep(state, run)


def keep(state: TrainState, run: RunDir) -> None:
    """Record the spikes of `state` and what they lost: after a restart those that the checkpoint knows."""
    run.keep_spikes([asdict(spike) for spike in state.spikes], spikes.lost_row(state.total))
