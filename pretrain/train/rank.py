"""One rank of a run, from its config to its exit code."""

import contextlib
import sys
import traceback
from collections.abc import Sequence

from data_pipeline.files.os_errors import is_misplaced, os_error_text
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import LaunchError, RankFacts, own_arguments, rank_facts
from parallel.rank_end import EndRecord, behind, kind_of_error
from pretrain.config import RunConfig, load
from pretrain.run_dir import RunDir
from pretrain.run_files import LOGS
from pretrain.train.checks import check_run
from pretrain.train.rank_log import log_rank
from pretrain.train.stop_signal import StopSignal


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
        step, code = _train(config, facts, run, stop)
        stopped = f"{stop.received[0]}" if stop.requested else "another rank was told to stop"
        status, reason = ("done", "all steps done") if code == ExitCode.DONE else ("stopped", stopped)
        if run is not None:
            run.close(status=status, reason=reason, exit_code=code, step=step)
            go_on = "" if code == ExitCode.DONE else "; the same command goes on from there"
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
        print(f"motley train: {told}" if told else traceback.format_exc(), file=sys.stderr, flush=True)
        if terminal is not None:
            print(f"motley train: {type(error).__name__} on a rank; see {terminal.log}", file=terminal.stream)
        return code


def _train(config: RunConfig, facts: RankFacts, run: RunDir | None, stop: StopSignal) -> tuple[int, int]:
    """(steps done, exit code). Imports torch here: a process that only starts ranks does without it."""
    from parallel.world import start

    world = start(config.parallel, facts)  # before the loop imports megatron-core, which would warn
    from pretrain.train.loop import train

    return train(config, world, run, stop)


def _explain(error: Exception) -> tuple[int, str | None]:
    """(exit code, the message that says all that a person needs); None: only a traceback can tell."""
    if isinstance(error, OSError):
        return ExitCode.USER_ERROR if is_misplaced(error) else ExitCode.FAILED, os_error_text(error)
    code = ExitCode.USER_ERROR if isinstance(error, ConfigError | LaunchError) else ExitCode.FAILED
    return code, None if _kind(error) is None else str(error)


def _why(error: Exception) -> tuple[str, str]:
    """(kind, message) for the rank's end record: of what happened first. A rank that fails may lose its peers
    while it leaves."""
    for first, told_as in behind(error):
        if (kind := kind_of_error(first) or _kind(first)) is not None:
            return kind, str(told_as) or type(told_as).__name__
    return "error", f"{type(error).__name__}: {error}"


def _kind(error: BaseException) -> str | None:
    """The kind of an error of our own; None for another's."""
    from data_pipeline.shards.faults import ChangedIndex, SpanTooLong
    from data_pipeline.shards.tar import ShardError

    if isinstance(error, ShardError | ChangedIndex | SpanTooLong):
        return "data"
    if isinstance(error, ConfigError | LaunchError):
        return "user_error"
    from parallel.engine import NothingToLearn
    from pretrain.checkpoint.folder import CheckpointError
    from pretrain.train.finite import NonFiniteError
    from pretrain.train.same_batch import BatchMismatch

    if isinstance(error, BatchMismatch | NothingToLearn):
        return "data"
    kinds = {NonFiniteError: "non_finite", CheckpointError: "checkpoint"}
    return next((kind for own, kind in kinds.items() if isinstance(error, own)), None)
