"""The training loop. One step, from stored documents to the state after it:

    stream        documents -> packed sequences, in one order for all layouts   data_pipeline/stream/stream.py
      v           a rank's share of the step, cut into micro-batches
    Batch         ids, targets, loss weights, positions  [sequences, tokens]    data_pipeline/stream/batch.py
      v           tokens sorted by tower, mask of documents; up to here a thread works ahead (loader.py)
    ModelInputs   the same values sorted, flat  [tokens]                        pretrain/models/inputs.py
      v           embedding, blocks, head, cross-entropy
    sums          of weighted losses and of loss weights, per modality          pretrain/models/pretraining.py
      v           the sum of losses / the loss weights of the global batch
    gradient      summed over micro-batches and ranks, clipped                  parallel/zero_engine.py
      v           optimizer, with the learning rate of the step
    parameters    and what routers counted -> thresholds of the next step       pretrain/train/thresholds.py
      v
    TrainState    step, position in the data, sums for metrics, thresholds      pretrain/train/state.py

The sum of losses is divided once, by the weight of the global batch, so neither the number of ranks nor the
cut into micro-batches changes the gradient. A checkpoint is the engine's tensors and the TrainState.

Importing this module imports torch and megatron-core: parallel.world.start comes first (see rank.py).
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from data_pipeline.stream.at_start import describe, warnings
from data_pipeline.stream.fetch_ahead import cache_warnings
from data_pipeline.stream.loader import Loader, StepBatch
from data_pipeline.stream.stream import Stream
from parallel.engine import StepResult
from parallel.exit_codes import ExitCode
from parallel.launch import arithmetic_settings
from parallel.world import World
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint import restore
from pretrain.checkpoint.save import CheckpointWriter
from pretrain.config import RunConfig
from pretrain.evaluation.document_sums import document_sums, losses_of, to_json
from pretrain.evaluation.losses import (
    Heldout,
    conditional_losses,
    heldout_losses,
    routing_states,
    tokens_that_ran,
)
from pretrain.metrics import Sums
from pretrain.models.dropout import DropoutDraw
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState
from pretrain.run_dir import RunDir
from pretrain.run_files import CHECKPOINTS
from pretrain.run_identity import RunIdentity
from pretrain.tensorboard_view import TensorBoardView
from pretrain.train import build, depth_steps, spike_steps, spikes
from pretrain.train.arithmetic import arithmetic_path, processor
from pretrain.train.consumed import note_unreadable, over_all_ranks
from pretrain.train.device_peak import device_name
from pretrain.train.meter import Meter
from pretrain.train.same_batch import require_same_batch
from pretrain.train.state import TrainState
from pretrain.train.stop_signal import StopSignal
from pretrain.train.vector_steps import with_images
from pretrain.training_stream import training_stream
from pretrain.weights.folder import digest
from pretrain.weights.warm_start import initial_weights

Sample = Callable[[ZeroEngine, TrainState, TensorBoardView], dict[str, float]]
"""Lets the model of an engine write samples after a step, and judges facts; returns metrics of facts."""


def train(
    config: RunConfig, world: World, run: RunDir | None, stop: StopSignal, sample: Sample | None = None
) -> tuple[TrainState, ExitCode]:
    """Make steps until the last one or a signal; returns the state after them, as saved, and the exit code.
    `run`, `sample`: the open run directory and what makes samples, if asked for; None beyond rank 0."""
    engine, heldout, data = build.engine(config, world), build.heldout(config, world), training_stream(config)
    identity, state = restore_or_start(config, engine, data, world, run)
    if run is not None:
        announce(config, run, data, state, world)
    with (
        build.loader(config, data, world, state.stream) as loader,
        Meter(config, world, run, state, num_too_long=data.num_too_long) as meter,
        checkpoint_writer(config, engine, world, identity) as checkpoints,
        stop,
    ):
        saved = state.step if state.step else None
        while state.step < config.num_steps and not told_to_stop(stop, world):
            batch = next_batch(config, loader, data, state, world)
            with meter.timing():
                inputs = inputs_of_step(config, batch, state, world)
                result = engine.train_step(inputs, state.step, spikes.refusal(config, state.recent))
                report = depth_steps.sum_over_ranks(result.report, config.model, world)
            why = spike_steps.spike_of(config, state, result, inputs, world)
            sums = meter.sums(batch, inputs, result, report)
            state = advance(config, state, batch, sums, result, report, why)
            if why is not None:
                state = after_spike(config, engine, checkpoints, world, identity, state, meter, stop, run)
                if config.on_spike == "rollback":
                    saved = state.step
                    continue
            meter.show(state)
            state = log_if_due(config, engine, heldout, state, result, world, meter, stop, sample)
            if is_due(config, state, config.every_steps.checkpoint):
                saved = save(checkpoints, state, meter, stop)
        stop.enter("save")
        if saved != state.step:
            save(checkpoints, state, meter, stop)
    stop.enter("end")
    world.shutdown()
    return state, ExitCode.DONE if state.step == config.num_steps else ExitCode.REQUEUE


def told_to_stop(stop: StopSignal, world: World) -> bool:
    """Whether any rank was told to stop; where a step begins."""
    stop.enter("step")
    return world.any(stop.requested)


def checkpoint_writer(
    config: RunConfig, engine: ZeroEngine, world: World, identity: RunIdentity
) -> CheckpointWriter:
    """The writer of the run's checkpoints."""
    return CheckpointWriter(
        config.run_dir / CHECKPOINTS,
        engine,
        world,
        keep=config.keep_checkpoints,
        stop_on_failure=config.on_failed_save == "stop",
        run=identity,
    )


def restore_or_start(
    config: RunConfig, engine: ZeroEngine, data: Stream, world: World, run: RunDir | None
) -> tuple[RunIdentity, TrainState]:
    """Load the run's newest good checkpoint into the engine; returns the run's identity and its state, which
    is that of step 0 without a checkpoint."""
    identity = world.broadcast(None if run is None else run.identity)
    restored = restore.restore(config.run_dir / CHECKPOINTS, engine, world, identity)
    if restored is None:
        return identity, TrainState.start(data.start())
    state = TrainState.from_json(restored.state)
    data.check(state.stream)
    return identity, state


def announce(config: RunConfig, run: RunDir, data: Stream, state: TrainState, world: World) -> None:
    """Record where this attempt starts and print it, with a line on each source of the data and warnings."""
    weights = initial_weights(config)
    digest_of_weights = None if weights is None else digest(weights)
    run.started(
        state.step,
        device=device_name(world.device),
        processor=processor(world.device),
        arithmetic=arithmetic_path(world.device, arithmetic_settings()),
        initial_weights=digest_of_weights,
    )
    beginning = "starts" if weights is None else f"starts from {weights}"
    place = f"goes on after step {state.step}" if state.step else beginning
    num_sequences = config.num_steps * config.sequences_per_step
    spike_steps.keep(state, run)
    lines = [*describe(data), *warnings(data, num_sequences, config.data.max_epochs), *cache_warnings(data)]
    print("\n".join((*lines, f"{config.run_dir}: {place}")), flush=True)


def next_batch(config: RunConfig, loader: Loader, data: Stream, state: TrainState, world: World) -> StepBatch:
    """The data of the next step, once all ranks know that it is fit to train on; see consumed.py."""
    batch = loader.next_step()
    require_same_batch(batch.micro_batches, step=state.step + 1, world=world)
    batch = over_all_ranks(batch, world)
    max_frac = config.data.max_unreadable_frac
    note_unreadable(batch, state, world, num_documents=data.num_documents, max_frac=max_frac)
    return batch


def inputs_of_step(config: RunConfig, batch: StepBatch, state: TrainState, world: World) -> list[ModelInputs]:
    """What the engine trains on: the inputs made ahead, with the RoutingState, which only now is known, and
    the noise on images and the dropout of the step. All ranks call it."""
    routing_state = RoutingState(thresholds=state.thresholds, progress=state.step / config.num_steps)
    inputs = [replace(inputs, routing_state=routing_state) for inputs in batch.inputs]
    inputs = with_images(config, inputs, batch.sequences, state.step, world)
    if not config.model.has_dropout:
        return inputs
    draws = (DropoutDraw(config.seed, state.step, numbers) for numbers in batch.sequences)
    return [replace(each, dropout=draw) for each, draw in zip(inputs, draws, strict=True)]


def advance(
    config: RunConfig,
    state: TrainState,
    batch: StepBatch,
    sums: Sums,
    result: StepResult,
    report: RouterReport,
    why: str | None,
) -> TrainState:
    """The state after a step, which consumed `batch` and measured `sums`. `report`: that of the routers of
    all ranks. `why`: why the step is a spike, whose update was not applied; None if it is none."""
    if why is not None:
        return spike_steps.leave_out(config, state, batch, sums, why)
    thresholds, shares = spike_steps.thresholds_after(config, state, report)
    routers = depth_steps.router_sums(config.model, report)
    recent = spikes.remember(config, state.recent, result)
    return state.advance(batch, sums, routers, thresholds, shares, recent)


def after_spike(
    config: RunConfig,
    engine: ZeroEngine,
    checkpoints: CheckpointWriter,
    world: World,
    identity: RunIdentity,
    state: TrainState,
    meter: Meter,
    stop: StopSignal,
    run: RunDir | None,
) -> TrainState:
    """Tell of the spike that `state` ends with; returns the state that the run goes on from, which is that of
    the newest good checkpoint, now in the engine, if on_spike asks for it. All ranks call it."""
    if config.on_spike == "rollback":
        stop.enter("save")
        state = spike_steps.roll_back(config, engine, checkpoints, world, identity, state)
        meter.go_back(state)
    spike_steps.tell(state, run)
    return state


def is_due(config: RunConfig, state: TrainState, every: int) -> bool:
    """Whether what happens every `every` steps happens after the step that is done, as after the last one."""
    return state.step % every == 0 or state.step == config.num_steps


def log_if_due(
    config: RunConfig,
    engine: ZeroEngine,
    heldout: Heldout,
    state: TrainState,
    result: StepResult,
    world: World,
    meter: Meter,
    stop: StopSignal,
    sample: Sample | None,
) -> TrainState:
    """Evaluate, sample and write a row of metrics, as far as they are due after the step that `result` is of;
    returns the state, whose window is closed if a row was written. All ranks call it."""
    row = evaluate_if_due(config, engine, heldout, state, world, meter, stop)
    row |= sample_if_due(config, engine, state, world, meter, stop, sample)
    if not row and not is_due(config, state, config.every_steps.log):
        return state
    return meter.log(state, result, row)


def evaluate_if_due(
    config: RunConfig,
    engine: ZeroEngine,
    heldout: Heldout,
    state: TrainState,
    world: World,
    meter: Meter,
    stop: StopSignal,
) -> dict[str, Any]:
    """Metrics of the evaluations that are due after this step, empty if none is. Pictures go to the meter.

    All ranks call it and get the same, but for time/eval_s, in seconds.
    """
    row: dict[str, Any] = {}
    began = time.perf_counter()

    def report_of(inputs: Sequence[ModelInputs]) -> RouterReport:
        _, report = engine.eval_step(inputs)
        return report

    rules = routing_states(config.model, state.thresholds, state.step / config.num_steps)
    for prefix, rule in rules:
        losses, conditional = losses_if_due(config, engine, heldout, state, stop, prefix, rule)
        row |= losses
        if conditional and heldout.images is not None:
            ran = tokens_that_ran(report_of, heldout.images, rule, world)
            meter.picture(state.step, f"{prefix}/image_tokens", heldout.images, ran)
    if not row:
        return row
    row |= losses_of_documents(config, engine, heldout, state, meter, stop, rules)
    if config.optimizer.ema_decay is not None:
        with engine.averaged():
            for prefix, rule in rules:
                name = f"eval/ema{prefix.removeprefix('eval')}"
                row |= losses_if_due(config, engine, heldout, state, stop, name, rule)[0]
    return row | {
        "time/eval_s": time.perf_counter() - began,
        "data/heldout_fingerprint": heldout.fingerprint,
    }


def losses_of_documents(
    config: RunConfig,
    engine: ZeroEngine,
    heldout: Heldout,
    state: TrainState,
    meter: Meter,
    stop: StopSignal,
    rules: Sequence[tuple[str, RoutingState]],
) -> dict[str, float]:
    """Losses over the documents of the last evaluation, whose sums the meter keeps; empty before the last
    step, and where none are asked for."""
    last = heldout.last
    if last is None or state.step != config.num_steps:
        return {}
    stop.enter("evaluation of documents")
    sums = {prefix: document_sums(engine, last, rule) for prefix, rule in rules}
    meter.keep_documents(to_json(last, sums, step=state.step, fingerprint=heldout.fingerprint))
    rows = [losses_of(sums[prefix], last.modalities, prefix, config.image_weights) for prefix, _ in rules]
    return {name: value for row in rows for name, value in row.items()}


def losses_if_due(
    config: RunConfig,
    engine: ZeroEngine,
    heldout: Heldout,
    state: TrainState,
    stop: StopSignal,
    prefix: str,
    rule: RoutingState,
) -> tuple[dict[str, float], bool]:
    """(held-out and conditional losses of the weights that the engine has, as far as they are due; whether
    conditional ones are)."""
    every = config.every_steps
    row: dict[str, float] = {}
    if is_due(config, state, every.eval):
        stop.enter("evaluation")
        row |= heldout_losses(engine, heldout, prefix, rule)
    conditional = is_due(config, state, every.eval_conditional or every.eval)
    if conditional:
        stop.enter("conditional evaluation")
        row |= conditional_losses(engine, heldout, prefix, rule)
    return row, conditional


def sample_if_due(
    config: RunConfig,
    engine: ZeroEngine,
    state: TrainState,
    world: World,
    meter: Meter,
    stop: StopSignal,
    sample: Sample | None,
) -> dict[str, float]:
    """Call `sample` on rank 0 if samples or facts are due, while the other ranks wait. All ranks call it.

    Returns metrics of facts, on rank 0 alone, after the last step alone.
    """
    every = config.every_steps.samples
    facts = config.evaluate.generate and state.step == config.num_steps
    if not facts and not (every and is_due(config, state, every)):
        return {}
    stop.enter("samples")
    row = {} if sample is None or meter.view is None else sample(engine, state, meter.view)
    world.barrier()
    return row


def save(checkpoints: CheckpointWriter, state: TrainState, meter: Meter, stop: StopSignal) -> int:
    """Begin a checkpoint of the step that is done, written while training goes on; returns the step."""
    stop.enter("save")
    saved = replace(state, rows_sha256=meter.sync())
    checkpoints.save(state.step, saved.to_json())
    return state.step
