"""`motley logs`: it prints the logs of a run's job and ranks, and may follow them. It imports no torch."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from pretrain.run_files import COMPARE_LOG, LOGS, attempt_logs, rank_log
from slurm.monitor.state import LIVE, ask_queue, history, job_names, read_state
from slurm.monitor.targets import RunTarget, run_target
from slurm.records import FOLDER, Attempt

LINES = 200
"""Lines shown of a file, unless all are asked for."""
_TAIL_BYTES = 1 << 20
_ASK_EVERY = 10
"""Polls of the files between two calls of squeue."""


def logs(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    follow: bool = False,
    rank: int | None = None,
    attempt: int | None = None,
    whole: bool = False,
    poll_s: float = 1.0,
    to: TextIO | None = None,
) -> int:
    """Print the end of the newest attempt's logs, of the job and rank 0 or of `rank`. Returns 0.

    `attempt`: its number in `motley status`; `whole`: print from the first line on; `follow`: go on with
    later attempts until the run ends or Ctrl-C. Raises ConfigError if there is no such run, attempt or rank.
    """
    out = to or sys.stdout
    run = run_target(path, overrides)
    _check(run, attempt, rank)
    printer = _Printer(out, whole=whole)
    try:
        num_polls, number, files = 0, None, []
        while True:
            attempts = history(run.directory)
            before, number = number, _number(attempts, attempt)
            if before not in (None, number):
                printer.show(files, to_the_end=True)
                print(f"==> attempt {number} begins", file=out)
            # The run is asked whether it has ended before its files are read, so that no last line is missed.
            ended = not follow or _ended(run, attempts, attempt, ask=num_polls % _ASK_EVERY == 0)
            files = _files(run.directory, attempts, number, attempt is not None, rank)
            printer.show(files, to_the_end=ended)
            if ended:
                nothing = [] if any(printer.offsets.values()) else [_nothing_printed(run, files)]
                out.writelines(f"{printable(line)}\n" for line in nothing + _why_it_ended(attempts, number))
                return 0
            num_polls += 1
            time.sleep(poll_s)
    except KeyboardInterrupt:
        return 0


def _check(run: RunTarget, attempt: int | None, rank: int | None) -> None:
    """Raise ConfigError if the run has no such attempt, or the attempt no such rank."""
    attempts = history(run.directory)
    if attempt is not None and not 0 <= attempt < len(attempts):
        legal = f"0 to {len(attempts) - 1}" if attempts else "none yet"
        raise ConfigError(f"--attempt {attempt}: {run.directory} has no such attempt; there are: {legal}")
    number = _number(attempts, attempt)
    ranks = attempts[number].get("world_size") if number is not None else None
    if rank is not None and (rank < 0 or (ranks is not None and rank >= ranks)):
        there = "" if ranks is None else f"; the attempt has ranks 0 to {ranks - 1}"
        raise ConfigError(f"--rank {rank}: no such rank{there}")


def _number(attempts: Sequence[Attempt], attempt: int | None) -> int | None:
    """The number of the attempt to show: the one asked for, else the newest; None if there is none."""
    return attempt if attempt is not None else len(attempts) - 1 if attempts else None


def _files(
    directory: Path, attempts: Sequence[Attempt], number: int | None, chosen: bool, rank: int | None
) -> list[Path]:
    """The log files to show, whether they exist or not.

    `chosen`: the user named the attempt. The job's output is then left out, since all attempts write into it.
    """
    log = rank_log(rank or 0)
    jobs = job_names(directory)
    if number is None:
        return [_output(directory, jobs[0])] if jobs and rank is None else []
    row = attempts[number]
    if row["job"] is None:
        return [*([directory / LOGS / COMPARE_LOG] if rank is None else []), directory / LOGS / log]
    job = f"{row['job']}" if row["task"] is None else f"{row['job']}_{row['task']}"
    folder = directory / LOGS / attempt_logs(job, row["attempt"])
    first = folder / "srun.log" if chosen else _output(directory, job)
    return [*([first] if rank is None else []), folder / log]


def _output(directory: Path, job: str) -> Path:
    """The output of a job; the jobs of an array write into the comparison's folder."""
    return (directory.parent if "_" in job else directory) / FOLDER / f"job_{job}.out"


def _ended(run: RunTarget, attempts: Sequence[Attempt], attempt: int | None, *, ask: bool) -> bool:
    """Whether nothing more will be printed. `ask`: squeue may be called to find out."""
    if attempt is not None and attempts[attempt]["next"] != "running":
        return True
    if attempts and attempts[-1]["next"] in ("done", "stopped"):
        jobs = {name.partition("_")[0] for name in job_names(run.directory)}
        if attempts[-1]["job"] is None or str(attempts[-1]["job"]) in jobs:
            return True
    return ask and read_state(run, ask_queue([run])[0], now=time.time()).state not in LIVE


def _why_it_ended(attempts: Sequence[Attempt], number: int | None) -> list[str]:
    """A line on why an attempt without Slurm ended; none if it runs. The output of a job says it itself."""
    row = None if number is None else attempts[number]
    if row is None or row["job"] is not None or row["next"] == "running" or not row["reason"]:
        return []
    return [f"==> attempt {number} ended: {row['reason']}"]


def _nothing_printed(run: RunTarget, files: Sequence[Path]) -> str:
    state = read_state(run, ask_queue([run])[0], now=time.time())
    searched = f"; looked into {', '.join(map(str, files))}" if files else ""
    return f"{run.directory}: {state.state}, nothing was printed{searched}"


class _Printer:
    """Prints the lines that files gain, as `tail -f` does, with a heading wherever the file changes."""

    def __init__(self, out: TextIO, *, whole: bool) -> None:
        self._out, self._whole = out, whole
        self.offsets: dict[Path, int] = {}
        """The number of bytes of a file that were printed or skipped."""
        self._last: Path | None = None

    def show(self, files: Sequence[Path], *, to_the_end: bool) -> None:
        """Print the new whole lines of `files`, and with `to_the_end` also an unfinished last line."""
        for file in files:
            try:
                size = file.stat().st_size
                first = file not in self.offsets
                start = self.offsets.get(file, 0 if self._whole else max(0, size - _TAIL_BYTES))
                start = start if start <= size else 0  # the file was replaced
                with file.open("rb") as opened:
                    opened.seek(start)
                    text = opened.read(size)
            except OSError:
                continue
            if not to_the_end:
                text = text[: text.rfind(b"\n") + 1]
            self.offsets[file] = start + len(text)
            lines = text.decode(errors="replace").splitlines()
            if first and not self._whole and (start or len(lines) > LINES):
                lines = [f"... earlier lines: --all, or {file}", *lines[-LINES:]]
            if lines:
                if self._last != file:
                    print(f"==> {file} <==", file=self._out)
                self._last = file
                print("\n".join(printable(line, keep="\t") for line in lines), file=self._out, flush=True)
