"""One rank of a run, from its config to its exit code."""

import contextlib
import os
import sys
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

from data_pipeline.files.os_errors import is_misplaced, os_error_text
from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import LaunchError, RankFacts, own_arguments, rank_facts
from parallel.rank_end import EndRecord, behind, kind_of_error, one_line
from pretrain.config import RunConfig, load
from pretrain.lineage.changes import as_extended, finish_change
from pretrain.newest_rows import heldout_text
from pretrain.run_dir import RunDir
from pretrain.run_files import LOGS, METRICS
from pretrain.train.checks import check_run
from pretrain.train.rank_log import Terminal, log_rank
from pretrain.train.stop_signal import StopSignal

if TYPE_CHECKING:  # it imports torch
    from pretrain.train.state import TrainState

_LEAVE_S = 0.8
"""Seconds in which a rank that leaves at a signal writes its records."""


@dataclass
class _Open:
    """What a rank has opened and closes however it ends; None: not yet."""

    facts: RankFacts | None = None
    end: EndRecord | None = None
    run: RunDir | None = None
    terminal: Terminal | None = None

    def close(
        self, *, code: int, kind: str, status: str, reason: str, message: str, step: int | None
    ) -> None:
        """Write the end record and the attempt's end: `message` and `reason`, why it ended."""
        if self.end is not None:
            self.end.close(exit_code=code, kind=kind, message=message, step=step)
        if self.run is not None:
            self.run.close(status=status, reason=reason, exit_code=code, step=step)


def main(argv: Sequence[str]) -> int:
    """One rank, from the config to the exit code. `argv`: RUN.toml key=value..."""
    argv = own_arguments(argv)
    opened = _Open()
    stop = StopSignal.install(
        lambda why: _leave(opened, why), lambda: opened.end is not None and opened.end.has_peer_ended()
    )
    try:
        if not argv:
            raise ConfigError("usage: python -m pretrain.train RUN.toml key=value...")
        facts = opened.facts = rank_facts()
        opened.end = EndRecord(facts.attempt_dir, facts.rank)
        config = as_extended(load(argv[0], argv[1:]))
        if facts.rank == 0:  # the others wait for it where ranks meet
            finish_change(config.run_dir)
            check_run(config, facts.world_size)
            command = ["motley", "train", *argv]
            opened.run = RunDir.open(config, world_size=facts.world_size, command=command)
        if facts.world_size > 1 and (facts.attempt_dir is None or facts.launcher == "spawn"):
            opened.terminal = log_rank(config.run_dir / LOGS, facts.rank)
        state, code = _train(config, facts, opened.run, stop)
        stop.enter("over")
        stopped = f"{stop.received[0]}" if stop.requested else "another rank was told to stop"
        status, reason = ("done", "all steps done") if code == ExitCode.DONE else ("stopped", stopped)
        opened.close(code=code, kind=status, status=status, reason=reason, message=reason, step=state.step)
        if opened.run is not None:
            print(_last_lines(config, state, reason, code), flush=True)
        return code
    except Exception as error:
        stop.enter("over")
        return _failed(opened, error)


def _failed(opened: _Open, error: Exception) -> int:
    """Record and print an error that ends this rank; returns the exit code."""
    code, told = _explain(error)
    kind, message = _why(error)
    reason = f"{type(error).__name__}: {error}"
    with contextlib.suppress(OSError):  # a full disk is what may have brought us here
        opened.close(code=code, kind=kind, status="failed", reason=reason, message=message, step=None)
    launcher_tells = _launcher_tells(opened)
    # With a terminal beside it, this process's own stderr is its log. Before, ranks would say the same.
    if opened.terminal is not None or not launcher_tells or (opened.facts and opened.facts.rank == 0):
        text = traceback.format_exc() if told is None else f"motley train: {told}"
        own = sys.stderr if opened.terminal is None else sys.__stderr__
        print(printable(text, keep="\n\t"), file=own, flush=True)
    if opened.terminal is not None and kind != "lost_peer" and not launcher_tells:
        line = printable(f"motley train: {one_line(message)}; see {opened.terminal.log}")
        print(line, file=opened.terminal.stream)
    return code


def _leave(opened: _Open, why: str) -> NoReturn:
    """End this process while its main thread waits, without a checkpoint; within a second, also where the
    file system hangs."""
    code = ExitCode.REQUEUE
    threading.Timer(_LEAVE_S, os._exit, (code,)).start()
    try:
        opened.close(code=code, kind="stopped", status="stopped", reason=why, message=why, step=None)
        os.write(2, f"motley: {why}\n".encode())
        if opened.terminal is not None and opened.run is not None and not _launcher_tells(opened):
            print(f"motley: {why}", file=opened.terminal.stream, flush=True)
    finally:
        os._exit(code)


def _launcher_tells(opened: _Open) -> bool:
    """Whether the process that started this rank names the rank that failed first (parallel/spawn.py)."""
    facts = opened.facts
    return facts is not None and facts.launcher == "spawn" and facts.attempt_dir is not None


def _train(
    config: RunConfig, facts: RankFacts, run: RunDir | None, stop: StopSignal
) -> "tuple[TrainState, ExitCode]":
    """(state, exit code). Imports torch here: a process that only starts ranks does without it."""
    from parallel.world import start

    world = start(config.parallel, facts)  # before the loop: it sets what DeepSpeed reads when imported
    from pretrain.train.loop import train

    sample = None
    if run is not None and (config.every_steps.samples or config.evaluate.generate):
        from pretrain.train.samples import sampler

        sample = sampler(config)
    return train(config, world, run, stop, sample)


def _last_lines(config: RunConfig, state: "TrainState", reason: str, code: ExitCode) -> str:
    """What rank 0 says last: held-out losses, how far the run is, and what of its data was lost."""
    losses = heldout_text(config.run_dir / METRICS)
    heldout = f"{config.run_dir}: held-out loss {losses}\n" if losses else ""
    go_on = "" if code == ExitCode.DONE else "; the same command goes on from there"
    lost = f"; {len(state.unreadable)} documents could not be read" if state.unreadable else ""
    saved = f"{config.run_dir}: {reason}, step {state.step} of {config.num_steps} is saved{lost}{go_on}"
    return heldout + saved


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
    from pretrain.train.spikes import SpikeError

    if isinstance(error, BatchMismatch | NothingToLearn):
        return "data"
    kinds = {NonFiniteError: "non_finite", SpikeError: "spike", CheckpointError: "checkpoint"}
    return next((kind for own, kind in kinds.items() if isinstance(error, own)), None)
