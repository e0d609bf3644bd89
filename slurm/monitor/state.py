"""Where a run stands, from Slurm's queue, its jobs' records and its own; of half-written files what is whole.

Imports no torch.
"""

import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.run_queue import rows_from_end
from pretrain.config import RunConfig
from pretrain.run_files import LOCK, METRICS, RECORD
from slurm.commands import Queued, how_it_ended, in_queue
from slurm.monitor.targets import RunTarget
from slurm.records import FOLDER, JOB, Attempt, last_submission, names_of, read_attempts, read_json

LIVE = ("queued", "requeued, waiting", "running", "training without Slurm")
"""States in which a run is still to go on by itself."""
_PACE_ROWS = 20
"""Newest rows of metrics that the pace is taken from."""
_WORDS = {"PENDING": "queued", "CONFIGURING": "running", "COMPLETING": "running"}


@dataclass(frozen=True)
class RunState:
    directory: Path
    state: str
    """One of LIVE, or: done, stopped, cancelled, left the queue, never submitted."""
    job: str | None
    """Its job's name, such as "812" or "812_3"; None: it never had one, or goes on without Slurm."""
    waits: str | None
    """Why Slurm lets it wait, and until when."""
    row: Mapping[str, Any]
    """Last row of metrics; {} if there is none."""
    step: int
    num_steps: int | None
    step_s: float | None
    """Seconds of a step lately, with waits for data and its share of evaluations."""
    attempts: Sequence[Attempt]
    """Those of jobs, and those without Slurm ("job" is None and "nodes" the machine), in order."""
    queue_wait_s: float
    """From submission, or requeue, to start: of all attempts, and of the one to come until now."""
    goodput_frac: float | None
    """Seconds of the steps that count (time/train_s) over seconds of all attempts. What is missing to 1 went
    into starting, evaluating, saving, and steps that were lost with a rank. None: it never began."""
    why: str | None
    """Why it last stopped, or what is known of it."""

    @property
    def left_s(self) -> float | None:
        """Seconds of training to go, without time in the queue."""
        if self.num_steps is None or self.step_s is None or self.state == "done":
            return None
        return (self.num_steps - self.step) * self.step_s


def job_names(directory: Path) -> list[str]:
    """The jobs of a run's last submission: itself, then those of its chain."""
    submission = last_submission(directory / FOLDER)
    job = read_json(submission / JOB) if submission else {}
    return names_of(job) if "job" in job else []


def names_of_jobs(directory: Path) -> tuple[str, str]:
    """What Slurm may call a job of the run: its own name, or, in an array, the comparison's."""
    return directory.absolute().name, directory.absolute().parent.name


def ours(directory: Path, queue: Mapping[str, Queued]) -> dict[str, Queued]:
    """The run's jobs that are in the queue. Slurm uses ids again: a job of another name is not the run's."""
    names = names_of_jobs(directory)
    return {job: queue[job] for job in job_names(directory) if job in queue and queue[job].name in names}


def ask_queue(runs: Sequence[RunTarget]) -> tuple[dict[str, Queued] | None, str | None]:
    """(what of the runs' jobs is in the queue, None); (None, why) where Slurm cannot be asked."""
    try:
        return in_queue([name for run in runs for name in job_names(run.directory)]), None
    except ConfigError as error:
        return None, str(error)


def history(directory: Path) -> list[Attempt]:
    """All attempts of a run in order: those of its jobs, and those without Slurm, told by record.json."""
    alone: list[Attempt] = []
    record = read_json(directory / RECORD)
    for number, own in enumerate(record.get("attempts", ())):
        if any(f"/{FOLDER}/" in word for word in own.get("command", ())):
            continue  # of a job: attempts.jsonl says more
        going = own.get("stopped") is None
        row = {key: own.get(key) for key in ("started", "from_step", "to_step", "exit_code")}
        row |= {"job": None, "task": None, "attempt": number, "nodes": own.get("host", "?"), "cause": None}
        row |= {"submitted": None, "ended": own.get("stopped"), "reason": own.get("reason")}
        row["next"] = "running" if going else "done" if own.get("exit_code") == 0 else "stopped"
        alone.append(row)
    if alone and alone[-1]["next"] == "running" and not _held(directory):
        alone[-1] |= {"next": "lost", "reason": "killed: no stop was recorded"}
    return sorted(
        [*read_attempts(directory / FOLDER), *alone], key=lambda each: seconds(each["started"]) or 0
    )


def read_state(run: RunTarget, queue: Mapping[str, Queued] | None, *, now: float) -> RunState:
    """`queue`: what `ask_queue` said; None: Slurm could not be asked."""
    directory = run.directory
    attempts = history(directory)
    submission = last_submission(directory / FOLDER)
    submitted = read_json(submission / JOB).get("submitted") if submission else None
    queued = ours(directory, queue or {})
    state, job, why = _state(directory, attempts, submitted, queued, asked=queue is not None)
    rows = list(islice(rows_from_end(directory / METRICS), _PACE_ROWS))
    row = rows[0] if rows else {}
    saved = max((each["to_step"] or each["from_step"] or 0 for each in attempts), default=0)
    waits = None
    if job in queued and queued[job].state == "PENDING":
        start = queued[job].start
        until = "" if start in ("N/A", "") else f", expected to start at {start} (local time)"
        waits = f"{queued[job].reason}{until}"
    waited = [(each["submitted"], each["started"]) for each in attempts if each["submitted"]]
    if state in ("queued", "requeued, waiting"):
        ended = [each["ended"] for each in attempts if each["job"] is not None]
        waited.append((submitted if state == "queued" else ended[-1], None))
    return RunState(
        directory=directory,
        state=state,
        job=job,
        waits=waits,
        row=row,
        step=int(row.get("step", saved)),
        num_steps=run.config.num_steps if run.config else None,
        step_s=_step_s(rows, run.config),
        attempts=attempts,
        queue_wait_s=sum(_between(start, end, now) for start, end in waited),
        goodput_frac=_goodput(directory, attempts, row, now, going=state in LIVE),
        why=why,
    )


def _state(
    directory: Path,
    attempts: Sequence[Attempt],
    submitted: str | None,
    queued: Mapping[str, Queued],
    *,
    asked: bool,
) -> tuple[str, str | None, str | None]:
    """(state, job, why it last stopped). What is newer goes before: a job, or training without Slurm."""
    jobs = job_names(directory)
    ids = {name.partition("_")[0] for name in jobs}
    of_jobs = [each for each in attempts if str(each["job"]) in ids]
    job = jobs[0] if jobs else None
    last = attempts[-1] if attempts else None
    why = next((each["reason"] for each in reversed(attempts) if each["next"] != "running"), None)
    if read_json(directory / RECORD).get("status") == "done":
        return "done", job, why
    if queued:
        job, found = next(iter(queued.items()))
        state = _WORDS.get(found.state, found.state.lower())
        return "requeued, waiting" if state == "queued" and of_jobs else state, job, why
    if last and last["job"] is None and (seconds(last["started"]) or 0) >= (seconds(submitted) or 0):
        going = last["next"] == "running"
        return "training without Slurm" if going else "stopped", None, why
    if job is None:
        return "never submitted", None, why
    end = of_jobs[-1]["next"] if of_jobs else None
    if end in ("done", "stopped", "ended"):
        state = {"ended": "cancelled"}.get(end, end)
        return state, job, why
    if not asked:
        state = {None: "queued", "running": "running", "lost": "left the queue"}.get(end, "requeued, waiting")
        return state, job, why
    job = jobs[-1] if end == "chained" else job
    word, array = how_it_ended(job, names_of_jobs(directory)), job.partition("_")[0]
    if word is None and not of_jobs and array != job:
        # An element that never began has no record of its own; that of a cancelled array speaks for it.
        word = how_it_ended(array, names_of_jobs(directory))
        word = word if word and word.startswith("CANCELLED") else None
    if word is None:
        why = "the job left the queue without a record: cancelled, or its first node was lost"
        return "left the queue", job, why
    state = "cancelled" if word.startswith("CANCELLED") else "stopped"
    before = "" if of_jobs else " before it started"
    return state, job, f"Slurm says {word}{before}; the job left no record of it"


def _held(directory: Path) -> bool:
    """Whether a process trains in the directory, as far as this machine can tell."""
    try:
        holder = re.match(r"pid (\d+) on (\S+)", (directory / LOCK).read_text())
    except OSError:
        return False
    if holder is None:
        return False
    return holder[2] != socket.gethostname() or os.path.exists(f"/proc/{holder[1]}")


def _step_s(rows: Sequence[Mapping[str, Any]], config: RunConfig | None) -> float | None:
    """From rows of metrics, newest first."""
    if not rows or "time/train_s" not in rows[0]:
        return None
    since = {"step": 0, "time/train_s": 0.0} if len(rows) < 2 else rows[-1]
    steps = rows[0]["step"] - since["step"]
    if steps < 1:
        return None
    evaluation_s = next((row["time/eval_s"] for row in rows if "time/eval_s" in row), 0.0)
    share = evaluation_s / config.every_steps.eval if config else 0.0
    return (rows[0]["time/train_s"] - since["time/train_s"]) / steps + share


def _goodput(
    directory: Path, attempts: Sequence[Attempt], row: Mapping[str, Any], now: float, *, going: bool
) -> float | None:
    spans = [(each["started"], each["ended"]) for each in attempts]
    # One that never said when it ended did so before the next began, or with the last row of metrics.
    spans = [(start, end or after) for (start, end), (after, _) in pairwise([*spans, (None, None)])]
    try:
        unknown = now if going else (directory / METRICS).stat().st_mtime
    except OSError:
        return None
    whole = sum(_between(start, end, unknown) for start, end in spans)
    return min(1.0, row["time/train_s"] / whole) if whole and "time/train_s" in row else None


def seconds(time: str | None) -> float | None:
    """An ISO time as seconds since 1970; None for what is none."""
    try:
        return datetime.fromisoformat(time).timestamp() if time else None
    except ValueError:
        return None


def _between(start: str | None, end: str | None, otherwise: float) -> float:
    began, ended = seconds(start), seconds(end)
    return 0.0 if began is None else max(0.0, (otherwise if ended is None else ended) - began)
