"""A queue of runs: it starts commands a few at a time, shows their progress and forwards signals.

This module imports no torch.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TextIO

from data_pipeline.files.lock import lock_directory
from data_pipeline.files.progress import Progress
from parallel.exit_codes import ExitCode
from parallel.launch import die_with_parent
from pretrain.newest_rows import last_row

POLL_S = 0.5
LOG_EVERY_S = 30.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)


@dataclass(frozen=True)
class RunCommand:
    """The command of one run, and the files that show its progress."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    """File to which stdout and stderr are appended."""
    metrics: Path
    """The metrics.jsonl that the run writes; the last row tells its step."""
    num_steps: int


@dataclass(frozen=True)
class Outcome:
    """An outcome says how a command ended."""

    name: str
    exit_code: int | None
    """None: a signal came before it was started. Negative: a signal of this number killed it."""
    log: Path
    asked_to_stop: bool = False

    @property
    def done(self) -> bool:
        return self.exit_code == 0

    @property
    def stopped(self) -> bool:
        """Whether it was not started, or stopped on request; it can be continued and has not failed."""
        by_signal = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGKILL)
        asked = self.asked_to_stop and self.exit_code in by_signal
        return asked or self.exit_code in (None, ExitCode.REQUEUE)


def lock_comparison(directory: Path) -> AbstractContextManager[None]:
    """Hold the comparison directory for this process. Raises ConfigError, naming who does, if it is held."""
    return lock_directory(
        directory,
        lambda holder: f"{directory}: {holder} is running this comparison; wait for it, or stop it first",
    )


def run_commands(commands: Sequence[RunCommand], *, concurrent_runs: int, out: TextIO) -> list[Outcome]:
    """Run all commands in order, `concurrent_runs` at a time; a failed one does not stop the others.

    SIGINT, SIGTERM, SIGUSR2 and SIGHUP are forwarded to the running ones as SIGTERM, so that runs save and
    stop, and no other is started; a second signal kills them. (They have sessions of their own, so Ctrl-C at
    a terminal reaches only this process.) They are killed if this process is. Must be called from the main
    thread.
    """
    if not commands:
        return []
    waiting = list(commands)
    running: dict[str, _Running] = {}
    outcomes: dict[str, Outcome] = {}
    num_forwarded = 0
    total, done = sum(command.num_steps for command in commands), sum(map(_steps_done, commands))
    with _collected_signals() as signals:
        try:
            with Progress("all runs", total, "step", done=done, log_every_s=LOG_EVERY_S, out=out) as all_runs:
                while running or (waiting and not signals):
                    while waiting and len(running) < concurrent_runs and not signals:
                        command = waiting.pop(0)
                        running[command.name] = _Running(command, out)
                    for number in signals[num_forwarded:]:
                        _forward(number, running.values(), kill=num_forwarded > 0, out=out)
                        num_forwarded += 1
                    time.sleep(POLL_S)
                    all_runs.advance(sum(run.update() for run in running.values()))
                    for outcome in _ended(running, asked_to_stop=bool(signals)):
                        all_runs.advance(running.pop(outcome.name).close(outcome.done))
                        outcomes[outcome.name] = outcome
                        if not (outcome.done or outcome.stopped):
                            print(f"{outcome.name} failed:\n{failure(outcome)}", file=out, flush=True)
        finally:
            for run in running.values():  # after an error in this process no run stays without a watcher
                run.send(signal.SIGTERM)
    return [outcomes.get(command.name, Outcome(command.name, None, command.log)) for command in commands]


@contextlib.contextmanager
def _collected_signals() -> Iterator[list[int]]:
    """A list that gains the number of every stop signal while the block runs."""
    signals: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    # An ignored signal stays ignored: under nohup, closing the terminal is no reason to stop.
    handled = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in handled}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _forward(number: int, running: Iterable["_Running"], *, kill: bool, out: TextIO) -> None:
    """Tell the running commands to stop, or kill them, after this process was sent the signal `number`."""
    action = "killing the runs" if kill else "the runs save and stop; a second one kills them"
    print(f"{signal.Signals(number).name}: {action}", file=out, flush=True)
    for run in running:
        run.send(signal.SIGKILL if kill else signal.SIGTERM)


def _ended(running: Mapping[str, "_Running"], *, asked_to_stop: bool) -> list[Outcome]:
    """The outcomes of the commands that have ended."""
    codes = {name: run.process.poll() for name, run in running.items()}
    return [
        Outcome(name, code, running[name].command.log, asked_to_stop=asked_to_stop)
        for name, code in codes.items()
        if code is not None
    ]


class _Running:
    """A started command and its line of progress."""

    def __init__(self, command: RunCommand, out: TextIO) -> None:
        self.command = command
        self.step = _steps_done(command)
        command.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with command.log.open("ab") as log:
            self.process = subprocess.Popen(
                command.argv,
                env=dict(command.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        self.progress = Progress(
            command.name, command.num_steps, "step", done=self.step, log_every_s=LOG_EVERY_S, out=out
        )
        self.progress.__enter__()

    def update(self) -> int:
        """Update the line of progress; returns the steps done since the last update.

        They are negative after a restart from an earlier checkpoint.
        """
        row = last_row(self.command.metrics)
        step = int(row.get("step", 0))
        gained, self.step = step - self.step, step
        if gained:
            figures = {"loss": row.get("train/loss"), "tokens/s": row.get("speed/tokens_per_s")}
            self.progress.advance(
                gained, **{name: value for name, value in figures.items() if value is not None}
            )
        return gained

    def close(self, done: bool) -> int:
        """End the line of progress; returns the steps done since the last update."""
        gained = self.update()
        self.progress.__exit__(None if done else RuntimeError, None, None)
        return gained

    def send(self, number: int) -> None:
        """Send a signal to the process; SIGKILL goes to all processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


def failure(outcome: Outcome, *, lines: int = 20) -> str:
    """A text for people: how a command ended, and the last lines of its log."""
    code = outcome.exit_code
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    tail = outcome.log.read_text(errors="replace").splitlines()[-lines:] if outcome.log.exists() else []
    return "\n".join([f"{how}; the end of {outcome.log}:", *(f"    {line}" for line in tail)])


def _steps_done(command: RunCommand) -> int:
    return int(last_row(command.metrics).get("step", 0))
