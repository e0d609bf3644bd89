"""Entry point of a run: the loop, and how it is started.

`motley train` calls `launch`, on one machine. `python -m pretrain.train RUN.toml key=value...` is one rank,
for launchers that start ranks themselves (torchrun, srun).
"""

import contextlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.toml_config import ConfigError
from parallel.launch import REQUEUE_EXIT_CODE, LaunchError, RankFacts, own_arguments, rank_facts, spawn
from parallel.rank_end import EndRecord, behind, kind_of_error
from pretrain.config import RunConfig, load
from pretrain.rank_log import log_rank
from pretrain.run_checks import check_run
from pretrain.run_dir import CHECKPOINTS, LOGS, RunDir, check_config, check_writable, finished_step
from pretrain.stop_signal import StopSignal, ignore_from_here_on

if TYPE_CHECKING:
    from data_pipeline.stream import Stream
    from parallel.engine import Engine
    from parallel.world import World
    from pretrain.checkpoint_writer import CheckpointWriter
    from pretrain.meter import Meter
    from pretrain.state import TrainState

DONE, FAILED, USER_ERROR = 0, 1, 2


def launch(run_path: str | Path, overrides: Sequence[str] = (), *, processes: int = 1) -> int:
    """Train the run of a file on this machine, or continue it from its last good checkpoint: the exit code.

    0 done, 85 stopped by a signal after a checkpoint, 2 the user's mistake, others failed. What can be wrong
    with config, layout, data and run directory is raised as ConfigError before any rank is started.
    """
    config = load(run_path, overrides)
    check_config(config)
    if (step := finished_step(config)) is not None:
        print(f"{config.run_dir} is done: {step} of {config.num_steps} steps. name=... starts another run")
        return DONE
    if processes < 1:
        raise ConfigError(f"--processes {processes}: at least 1")
    try:
        world_size = processes if processes > 1 else rank_facts().world_size
    except LaunchError as error:
        raise ConfigError(str(error)) from None
    check_run(config, world_size)
    check_writable(config)
    argv = [str(run_path), *overrides]
    return main(argv) if processes == 1 else spawn(["-m", "pretrain.train", *argv], processes)


def main(argv: Sequence[str]) -> int:
    """One rank, from the config to the exit code. `argv`: RUN.toml key=value..."""
    argv = own_arguments(argv)
    stop = StopSignal.install()
    terminal, run, end = None, None, None
    try:
        if not argv:
            raise ConfigError("usage: python -m pretrain.train RUN.toml key=value...")
        facts = rank_facts()
        end = EndRecord(facts)
        config = load(argv[0], argv[1:])
        if facts.rank == 0:  # the others wait for it where ranks meet
            check_run(config, facts.world_size)
            run = RunDir.open(config, world_size=facts.world_size, command=["motley", "train", *argv])
        if facts.world_size > 1 and facts.attempt_dir is None:
            terminal = log_rank(config.run_dir / LOGS, facts.rank)
        step, code = train(config, facts, run, stop)
        stopped = f"{stop.received[0]}" if stop.requested else "another rank was told to stop"
        status, reason = ("done", "all steps done") if code == DONE else ("stopped", stopped)
        if run is not None:
            run.close(status=status, reason=reason, exit_code=code, step=step)
            go_on = "" if code == DONE else "; the same command goes on from there"
            print(
                f"{config.run_dir}: {reason}, step {step} of {config.num_steps} is saved{go_on}", flush=True
            )
        end.close(exit_code=code, kind=status, message=reason, step=step)
        return code
    except Exception as error:
        code, told = _explain(error)
        if end is not None:
            kind, message = _why(error)
            end.close(exit_code=code, kind=kind, message=message, step=None)
        if run is not None:
            with contextlib.suppress(OSError):  # a full disk is what may have brought us here
                reason = f"{type(error).__name__}: {error}"
                run.close(status="failed", reason=reason, exit_code=code, step=None)
        print(f"motley train: {error}" if told else traceback.format_exc(), file=sys.stderr, flush=True)
        if terminal is not None:
            print(f"motley train: {type(error).__name__} on a rank; see {terminal.log}", file=terminal.stream)
        return code


def _explain(error: Exception) -> tuple[int, bool]:
    """(exit code, whether the message says all that a person needs)."""
    return USER_ERROR if isinstance(error, ConfigError | LaunchError) else FAILED, _kind(error) is not None


def _why(error: Exception) -> tuple[str, str]:
    """(kind, message) for the rank's end record: of what happened first. A rank that fails may lose its peers
    while it leaves."""
    for first, told_as in behind(error):
        if (kind := kind_of_error(first) or _kind(first)) is not None:
            return kind, str(told_as) or type(told_as).__name__
    return "error", f"{type(error).__name__}: {error}"


def _kind(error: BaseException) -> str | None:
    """The kind of an error of our own; None for another's."""
    from data_pipeline.faults import ChangedIndex, ReaderDied, SpanTooLong
    from data_pipeline.shards import ShardError

    if isinstance(error, ShardError | ChangedIndex | SpanTooLong | ReaderDied):
        return "data"
    if isinstance(error, ConfigError | LaunchError):
        return "user_error"
    from parallel.engine import NothingToLearn
    from pretrain.checkpoint_folder import CheckpointError
    from pretrain.finite import NonFiniteError
    from pretrain.same_batch import BatchMismatch

    if isinstance(error, BatchMismatch | NothingToLearn):
        return "data"
    kinds = {NonFiniteError: "non_finite", CheckpointError: "checkpoint"}
    return next((kind for own, kind in kinds.items() if isinstance(error, own)), None)


def train(config: RunConfig, facts: RankFacts, run: RunDir | None, stop: StopSignal) -> tuple[int, int]:
    """Steps until the last or a signal; returns (step, exit code). `run`: the open directory, on rank 0."""
    # Here and not above: the process that only starts ranks stays light.
    from data_pipeline.stream import describe
    from parallel.world import start

    world = start(config.parallel, facts)  # before megatron-core is imported otherwise: that warns
    from pretrain import build, depth_steps
    from pretrain.checkpoint_writer import CheckpointWriter
    from pretrain.device_peak import device_name
    from pretrain.evaluate import conditional_losses, heldout_losses, selections, tokens_that_ran
    from pretrain.finite import require_finite
    from pretrain.meter import Meter
    from pretrain.models.inputs import build_inputs
    from pretrain.same_batch import require_same_batch
    from pretrain.thresholds import Selection
    from pretrain.warm_start import initial_weights
    from pretrain.weights import digest

    engine = build.engine(config, world)
    heldout = build.heldout(config, world)
    data = build.stream(config)
    state = restore_or_start(config, engine, data, world)
    if run is not None:
        weights = initial_weights(config)
        digest_of_weights = None if weights is None else digest(weights)
        run.started(state.step, device=device_name(world.device), initial_weights=digest_of_weights)
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
            chosen_by = Selection(thresholds=state.thresholds, progress=state.step / config.num_steps)
            with meter.timing():
                inputs = [
                    build_inputs(
                        micro_batch,
                        config.model,
                        document_mask=config.data.document_mask,
                        selection=chosen_by,
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
            for prefix, selection in selections(
                config.model, state.thresholds, state.step / config.num_steps
            ):
                if due(every.eval):
                    evaluation |= heldout_losses(engine, heldout, prefix, selection)
                if due(every.conditional or every.eval):
                    evaluation |= conditional_losses(engine, heldout, prefix, selection)
                    if heldout.images is not None:
                        ran = tokens_that_ran(engine.eval_step, heldout.images, selection, world)
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
    return state.step, DONE if state.step == config.num_steps else REQUEUE_EXIT_CODE


def restore_or_start(config: RunConfig, engine: "Engine", data: "Stream", world: "World") -> "TrainState":
    """Load the newest good checkpoint into the engine; the state of step 0 if there is none."""
    from pretrain import checkpoint
    from pretrain.state import TrainState

    restored = checkpoint.restore(config.run_dir / CHECKPOINTS, engine, world)
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


if __name__ == "__main__":
    exit_code = main(sys.argv[1:])
    ignore_from_here_on()
    raise SystemExit(exit_code)
