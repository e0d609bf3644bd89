"""The training loop, read from top to bottom."""

import time
from typing import TYPE_CHECKING

from parallel.exit_codes import ExitCode
from parallel.launch import RankFacts, arithmetic_settings
from pretrain.config import RunConfig
from pretrain.run_dir import CHECKPOINTS, RunDir
from pretrain.train.stop_signal import StopSignal

if TYPE_CHECKING:
    from data_pipeline.stream.stream import Stream
    from parallel.engine import Engine
    from parallel.world import World
    from pretrain.checkpoint.save import CheckpointWriter
    from pretrain.train.meter import Meter
    from pretrain.train.state import TrainState


def train(config: RunConfig, facts: RankFacts, run: RunDir | None, stop: StopSignal) -> tuple[int, int]:
    """Steps until the last or a signal; returns (step, exit code). `run`: the open directory, on rank 0."""
    # Here and not above: the process that only starts ranks stays light.
    from data_pipeline.stream.stream import describe
    from parallel.world import start

    world = start(config.parallel, facts)  # before megatron-core is imported otherwise: that warns
    from pretrain.checkpoint.save import CheckpointWriter
    from pretrain.evaluation.losses import conditional_losses, heldout_losses, routing_states, tokens_that_ran
    from pretrain.models.inputs import build_inputs
    from pretrain.models.routing_state import RoutingState
    from pretrain.train import build, depth_steps
    from pretrain.train.arithmetic import arithmetic_path, processor
    from pretrain.train.device_peak import device_name
    from pretrain.train.finite import require_finite
    from pretrain.train.meter import Meter
    from pretrain.train.same_batch import require_same_batch
    from pretrain.weights.folder import digest
    from pretrain.weights.warm_start import initial_weights

    engine = build.engine(config, world)
    heldout = build.heldout(config, world)
    data = build.stream(config)
    state = restore_or_start(config, engine, data, world)
    if run is not None:
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
        print("\n".join((*describe(data), f"{config.run_dir}: {place}")), flush=True)
    every = config.every_steps

    def due(steps: int) -> bool:
        return state.step % steps == 0 or state.step == config.num_steps

    with (
        build.loader(config, data, world, state.stream) as loader,
        Meter(config, world, run, state) as meter,
        CheckpointWriter(
            config.run_dir / CHECKPOINTS, engine, world, keep=config.keep_checkpoints
        ) as checkpoints,
    ):
        saved = state.step if state.step else None
        while state.step < config.num_steps and not world.any(stop.requested):
            batch = loader.next_step()
            require_same_batch(batch.micro_batches, step=state.step + 1, world=world)
            chosen_by = RoutingState(thresholds=state.thresholds, progress=state.step / config.num_steps)
            with meter.timing():
                inputs = [
                    build_inputs(
                        micro_batch,
                        config.model,
                        document_mask=config.data.document_mask,
                        routing_state=chosen_by,
                    )
                    for micro_batch in batch.micro_batches
                ]
                result = engine.train_step(inputs, state.step)
                counted = depth_steps.count_step(engine.module, config.model, world)
            require_finite(result, inputs, config.model.modalities, step=state.step + 1, world=world)
            chosen_next = depth_steps.thresholds_after(
                state.thresholds,
                state.shares,
                counted,
                config.model,
                step=state.step + 1,
                num_steps=config.num_steps,
            )
            state = state.advance(batch, meter.sums(batch, inputs, result, counted), *chosen_next)
            meter.show(state)
            evaluation: dict[str, float] = {}
            began = time.perf_counter()
            for prefix, routing_state in routing_states(
                config.model, state.thresholds, state.step / config.num_steps
            ):
                if due(every.eval):
                    evaluation |= heldout_losses(engine, heldout, prefix, routing_state)
                if due(every.eval_conditional or every.eval):
                    evaluation |= conditional_losses(engine, heldout, prefix, routing_state)
                    if heldout.images is not None:
                        ran = tokens_that_ran(engine.eval_step, heldout.images, routing_state, world)
                        meter.picture(state.step, f"{prefix}/image_tokens", heldout.images, ran)
            if evaluation:
                evaluation["time/eval_s"] = time.perf_counter() - began
            if due(every.log) or evaluation:
                state = meter.log(state, result, evaluation)
            if due(every.checkpoint):
                saved = save(checkpoints, state, meter)
        if saved != state.step:
            save(checkpoints, state, meter)
    world.shutdown()
    return state.step, ExitCode.DONE if state.step == config.num_steps else ExitCode.REQUEUE


def restore_or_start(config: RunConfig, engine: "Engine", data: "Stream", world: "World") -> "TrainState":
    """Load the newest good checkpoint into the engine; the state of step 0 if there is none."""
    from pretrain.checkpoint import restore
    from pretrain.train.state import TrainState

    restored = restore.restore(config.run_dir / CHECKPOINTS, engine, world)
    if restored is None:
        return TrainState.start(data.start())
    state = TrainState.from_json(restored.state)
    data.check(state.stream)
    return state


def save(checkpoints: "CheckpointWriter", state: "TrainState", meter: "Meter") -> int:
    """Begin a checkpoint of the step that is done, written while training goes on; returns the step."""
    meter.sync()
    checkpoints.save(state.step, state.to_json())
    return state.step
