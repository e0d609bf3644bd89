"""Run commands a few at a time, watch them by what they write, pass signals on. Imports no torch."""

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from parallel.exit_codes import ExitCode
from parallel.launch import die_with_parent

POLL_S = 0.5
LOG_EVERY_S = 30.0
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2, signal.SIGHUP)
_METRICS_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Job:
    """One command, and where to see how far it is."""

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    log: Path
    """Its stdout and stderr are appended here."""
    metrics: Path
    """metrics.jsonl that it writes; its last row says how far it is."""
    num_steps: int


@dataclass(frozen=True)
class Outcome:
    name: str
    exit_code: int | None
    """None: never started, because a signal came first. Negative: killed by that signal."""
    log: Path
    asked_to_stop: bool = False

    @property
    def done(self) -> bool:
        return self.exit_code == 0

    @property
    def stopped(self) -> bool:
        """Not started, or ended because it was told to: to be continued, and no failure."""
        told = (-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL, 128 + signal.SIGKILL)
        return self.exit_code in (None, ExitCode.REQUEUE) or (self.asked_to_stop and self.exit_code in told)


@contextlib.contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the directory for this process; the kernel lets go of it with the process, however that ends.

    Raises ConfigError, naming the holder, if another process has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise ConfigError(
                f"{directory}: {lock.read().strip() or 'another process'} is running this comparison; "
                "wait for it, or stop it first"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
                raise
            print(f"{lock.name}: no locks on this file system; do not start it twice", file=sys.stderr)
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield


def run_jobs(jobs: Sequence[Job], *, concurrent_runs: int, out: TextIO) -> list[Outcome]:
    """Run all jobs, `concurrent_runs` at a time and in order; one that fails does not stop the others.

    SIGINT, SIGTERM, SIGUSR2 and SIGHUP reach the running ones as SIGTERM, which makes a run save and stop,
    and no other is started; a second signal kills them. (They have sessions of their own: Ctrl-C at a
    terminal comes through here only.) Should this process be killed, they are too. Must be called from the
    main thread.
    """
    if not jobs:
        return []
    waiting = list(jobs)
    running: dict[str, _Running] = {}
    outcomes: dict[str, Outcome] = {}
    signals: list[int] = []
    forwarded = 0

    def note(number: int, _: FrameType | None) -> None:
        signals.append(number)

    # One that is ignored stays so: under nohup a closed terminal is no reason to stop.
    heard = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, note) for number in heard}
    try:
        total, already = sum(job.num_steps for job in jobs), sum(map(_steps_done, jobs))
        with Progress("all runs", total, "step", done=already, log_every_s=LOG_EVERY_S, out=out) as all_runs:
            while running or (waiting and not signals):
                while waiting and len(running) < concurrent_runs and not signals:
                    job = waiting.pop(0)
                    running[job.name] = _Running(job, out)
                for number in signals[forwarded:]:
                    kill = forwarded > 0
                    action = "killing the runs" if kill else "the runs save and stop; a second one kills them"
                    print(f"{signal.Signals(number).name}: {action}", file=out, flush=True)
                    for each in running.values():
                        each.send(signal.SIGKILL if kill else signal.SIGTERM)
                    forwarded += 1
                time.sleep(POLL_S)
                for name, each in list(running.items()):
                    all_runs.advance(each.look())
                    code = each.process.poll()
                    if code is not None:
                        all_runs.advance(each.close(code))
                        outcomes[name] = Outcome(name, code, each.job.log, asked_to_stop=bool(signals))
                        del running[name]
                        if not (outcomes[name].done or outcomes[name].stopped):
                            print(f"{name} failed:\n{failure(outcomes[name])}", file=out, flush=True)
    finally:
        for each in running.values():  # only on an error of our own: leave no run without a watcher
            each.send(signal.SIGTERM)
        for number, handler in previous.items():
            signal.signal(number, handler)
    return [outcomes.get(job.name, Outcome(job.name, None, job.log)) for job in jobs]


class _Running:
    """A started job and its line of progress."""

    def __init__(self, job: Job, out: TextIO) -> None:
        self.job = job
        self.step = _steps_done(job)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        parent = os.getpid()
        with job.log.open("ab") as log:
            self.process = subprocess.Popen(
                job.argv,
                env=dict(job.env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: die_with_parent(parent),
            )
        self.progress = Progress(
            job.name, job.num_steps, "step", done=self.step, log_every_s=LOG_EVERY_S, out=out
        )
        self.progress.__enter__()

    def look(self) -> int:
        """Update the line; returns the steps done since the last look (negative after a run fell back)."""
        row = last_row(self.job.metrics)
        step = int(row.get("step", 0))
        gained, self.step = step - self.step, step
        if gained:
            figures = {"loss": row.get("train/loss"), "tokens/s": row.get("speed/tokens_per_s")}
            self.progress.advance(
                gained, **{name: value for name, value in figures.items() if value is not None}
            )
        return gained

    def close(self, code: int) -> int:
        gained = self.look()
        if code == 0:
            self.progress.__exit__(None, None, None)
        else:
            self.progress.__exit__(RuntimeError, None, None)
        return gained

    def send(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGKILL:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)


def failure(outcome: Outcome, *, lines: int = 20) -> str:
    """How a job ended and the end of its log, for a person."""
    code = outcome.exit_code
    how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
    tail = outcome.log.read_text(errors="replace").splitlines()[-lines:] if outcome.log.exists() else []
    return "\n".join([f"{how}; the end of {outcome.log}:", *(f"    {line}" for line in tail)])


def last_row(metrics: Path) -> dict[str, Any]:
    """Last whole row of a metrics.jsonl that is being written; {} if there is none."""
    return next(rows_from_end(metrics), {})


def rows_from_end(metrics: Path) -> Iterator[dict[str, Any]]:
    """Whole rows of a metrics.jsonl that is being written, the newest first, as far as its tail goes."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _METRICS_TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                yield row


def _steps_done(job: Job) -> int:
    return int(last_row(job.metrics).get("step", 0))
