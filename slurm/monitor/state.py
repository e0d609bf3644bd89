"""The state of a run, from Slurm's queue, the records of its jobs and the files in its directory.

Half-written lines of those files are ignored. This module imports no torch.
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
from pretrain.config import RunConfig
from pretrain.newest_rows import rows_from_end
from pretrain.run_files import LOCK, METRICS, RECORD
from slurm.commands import Queued, final_state, in_queue
from slurm.monitor.targets import RunTarget
from slurm.records import (
    FOLDER,
    JOB,
    Attempt,
    last_submission,
    names_of,
    read_attempts,
    read_json,
    saved_step,
)

LIVE = ("queued", "requeued, waiting", "running", "training without Slurm")
"""States in which a run goes on by itself."""
_PACE_ROWS = 20
"""The number of newest rows of metrics that the time of a step is averaged over."""
_WORDS = {"PENDING": "queued", "CONFIGURING": "running", "COMPLETING": "running"}


@dataclass(frozen=True)
class RunState:
    """The state of a run at one moment."""

    directory: Path
    state: str
    """A state of LIVE, or "done", "stopped", "cancelled", "left the queue", "never submitted",
    "record.json is damaged"."""
    job: str | None
    """The name of the run's job, such as "812" or "812_3"; None if it has none or trains without Slurm."""
    waits: str | None
    """Why the job waits in the queue, and until when."""
    row: Mapping[str, Any]
    """The last row of metrics.jsonl; {} if there is none."""
    step: int
    num_steps: int | None
    step_s: float | None
    """Seconds of a recent step, with waits for data and a share of the evaluations."""
    attempts: Sequence[Attempt]
    """All attempts in order; without Slurm, "job" is None and "nodes" names the machine."""
    queue_wait_s: float
    """Seconds in the queue, from submission or requeue to start, over all attempts and up to now."""
    goodput_frac: float | None
    """Seconds of the steps that count (time/train_s without time/lost_s and a trunk's time/inherited_s) over
    seconds of all attempts. The rest went into starting, evaluating, saving and steps that were lost with a
    rank or to a spike. None: the run never began."""
    why: str | None
    """Why the run last stopped, as far as is known."""

    @property
    def left_s(self) -> float | None:
        """Seconds of training left, without time in the queue."""
        if self.num_steps is None or self.step_s is None or self.state == "done":
            return None
        return (self.num_steps - self.step) * self.step_s


def job_names(directory: Path) -> list[str]:
    """The jobs of a run's last submission: the first job, then the rest of its chain."""
    submission = last_submission(directory / FOLDER)
    job = read_json(submission / JOB) if submission else {}
    return names_of(job) if "job" in job else []


def names_of_jobs(directory: Path) -> tuple[str, str]:
    """The names that Slurm may have for the run's job: the run's or, in an array, the comparison's."""
    return directory.absolute().name, directory.absolute().parent.name


def queued_jobs(directory: Path, queue: Mapping[str, Queued]) -> dict[str, Queued]:
    """The run's jobs that are in the queue. Slurm reuses ids, so a job of another name is not the run's."""
    names = names_of_jobs(directory)
    return {job: queue[job] for job in job_names(directory) if job in queue and queue[job].name in names}


def ask_queue(runs: Sequence[RunTarget]) -> tuple[dict[str, Queued] | None, str | None]:
    """(the runs' jobs that are in the queue, None); (None, the reason) if Slurm does not answer."""
    try:
        return in_queue([name for run in runs for name in job_names(run.directory)]), None
    except ConfigError as error:
        return None, str(error)


_SHOWN = ("started", "ended", "nodes", "from_step", "to_step", "exit_code", "cause", "next", "reason")
"""Keys of an attempt that are shown; one that a damaged row lacks is None."""


def history(directory: Path) -> list[Attempt]:
    """All attempts of a run in order: those of its jobs, and those without Slurm from record.json."""
    without_slurm: list[Attempt] = []
    record = read_json(directory / RECORD)
    for number, own in enumerate(record.get("attempts", ())):
        if any(f"/{FOLDER}/" in word for word in own.get("command", ())):
            continue  # a job's attempt, which attempts.jsonl tells more about
        going = own.get("stopped") is None
        row = {key: own.get(key) for key in ("started", "from_step", "to_step", "exit_code")}
        row |= {"job": None, "task": None, "attempt": number, "nodes": own.get("host", "?"), "cause": None}
        row |= {"submitted": None, "ended": own.get("stopped"), "reason": own.get("reason")}
        row["next"] = "running" if going else "done" if own.get("exit_code") == 0 else "stopped"
        without_slurm.append(row)
    if without_slurm and without_slurm[-1]["next"] == "running" and not _is_locked(directory):
        without_slurm[-1] |= {"next": "lost", "reason": "killed: no stop was recorded"}
    of_jobs = [dict.fromkeys(_SHOWN) | row for row in read_attempts(directory / FOLDER)]
    attempts = [*of_jobs, *without_slurm]
    return sorted(attempts, key=lambda attempt: seconds(attempt["started"]) or 0)


def read_state(run: RunTarget, queue: Mapping[str, Queued] | None, *, now: float) -> RunState:
    """The state of a run. `queue`: the result of `ask_queue`; None: Slurm did not answer."""
    directory = run.directory
    attempts = history(directory)
    submission = last_submission(directory / FOLDER)
    submitted = read_json(submission / JOB).get("submitted") if submission else None
    queued = queued_jobs(directory, queue or {})
    state, job, why = _state(directory, attempts, submitted, queued, asked=queue is not None)
    rows = list(islice(rows_from_end(directory / METRICS), _PACE_ROWS))
    row = rows[0] if rows else {}
    saved = max((attempt["to_step"] or attempt["from_step"] or 0 for attempt in attempts), default=0)
    waits = None
    if job in queued and queued[job].state == "PENDING":
        start = queued[job].start
        until = "" if start in ("N/A", "") else f", expected to start at {start} (local time)"
        waits = f"{queued[job].reason}{until}"
    waited = [(attempt["submitted"], attempt["started"]) for attempt in attempts if attempt["submitted"]]
    if state in ("queued", "requeued, waiting"):
        ended = [attempt["ended"] for attempt in attempts if attempt["job"] is not None]
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
    """(state, job, why the run last stopped), from its newer part: a job, or training without Slurm.

    `asked`: whether Slurm answered; `queued` is empty otherwise.
    """
    jobs = job_names(directory)
    ids = {name.partition("_")[0] for name in jobs}
    of_jobs = [attempt for attempt in attempts if str(attempt["job"]) in ids]
    job = jobs[0] if jobs else None
    last = attempts[-1] if attempts else None
    why = next((attempt["reason"] for attempt in reversed(attempts) if attempt["next"] != "running"), None)
    record = read_json(directory / RECORD)
    if record.get("status") == "done":
        gone = _lost_checkpoint(directory, record)
        return ("stopped", job, gone) if gone else ("done", job, why)
    if queued:
        job, entry = next(iter(queued.items()))
        state = _WORDS.get(entry.state, entry.state.lower())
        return "requeued, waiting" if state == "queued" and of_jobs else state, job, why
    if last and last["job"] is None and (seconds(last["started"]) or 0) >= (seconds(submitted) or 0):
        going = last["next"] == "running"
        return "training without Slurm" if going else "stopped", None, why
    if job is None:
        damaged = not record and (directory / RECORD).exists()
        return f"{RECORD} is damaged" if damaged else "never submitted", None, why
    end = of_jobs[-1]["next"] if of_jobs else None
    if end in ("done", "stopped", "ended"):
        state = {"ended": "cancelled", "done": "stopped" if record.get("changes") else "done"}.get(end, end)
        return state, job, why
    if not asked:
        state = {None: "queued", "running": "running", "lost": "left the queue"}.get(end, "requeued, waiting")
        return state, job, why
    return _state_outside_queue(directory, jobs[-1] if end == "chained" else job, started=bool(of_jobs))


def _lost_checkpoint(directory: Path, record: Mapping[str, Any]) -> str | None:
    """A sentence if the last checkpoint of a run that ended is gone; None if it is there."""
    saved, last_step = saved_step(directory), (record.get("attempts") or [{}])[-1].get("to_step")
    if saved and isinstance(last_step, int) and saved < last_step:
        return f"the checkpoint of step {last_step} is gone; the newest is of step {saved}"
    return None


def _state_outside_queue(directory: Path, job: str, *, started: bool) -> tuple[str, str, str]:
    """(state, job, why) of a job that has left the queue without an end record, from Slurm's accounting."""
    names, array = names_of_jobs(directory), job.partition("_")[0]
    slurm_state = final_state(job, names)
    if slurm_state is None and not started and array != job:
        # Slurm has no record of an element that never began, but it has one of the cancelled array.
        slurm_state = final_state(array, names)
        slurm_state = slurm_state if slurm_state and slurm_state.startswith("CANCELLED") else None
    if slurm_state is None:
        why = "the job left the queue without a record: cancelled, or its first node was lost"
        return "left the queue", job, why
    state = "cancelled" if slurm_state.startswith("CANCELLED") else "stopped"
    before = "" if started else " before it started"
    return state, job, f"Slurm says {slurm_state}{before}; the job left no record of it"


def _is_locked(directory: Path) -> bool:
    """Whether a process trains in the directory, as far as this machine can tell."""
    try:
        holder = re.match(r"pid (\d+) on (\S+)", (directory / LOCK).read_text(errors="replace"))
    except OSError:
        return False
    if holder is None:
        return False
    return holder[2] != socket.gethostname() or os.path.exists(f"/proc/{holder[1]}")


def _step_s(rows: Sequence[Mapping[str, Any]], config: RunConfig | None) -> float | None:
    """Seconds of a step, averaged over `rows` of metrics, which are given newest first."""
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
    """The share of the attempts' seconds that went into steps that count; None if the run never began."""
    spans = [(attempt["started"], attempt["ended"]) for attempt in attempts]
    # An attempt without an end record ended before the next one began, or with the last row of metrics.
    spans = [(start, end or after) for (start, end), (after, _) in pairwise([*spans, (None, None)])]
    try:
        unknown = now if going else (directory / METRICS).stat().st_mtime
    except OSError:
        return None
    whole = sum(_between(start, end, unknown) for start, end in spans)
    if not whole or "time/train_s" not in row:
        return None
    elsewhere_s = row.get("time/lost_s", 0.0) + row.get("time/inherited_s", 0.0)
    return min(1.0, (row["time/train_s"] - elsewhere_s) / whole)


def seconds(time: str | None) -> float | None:
    """An ISO time as seconds since 1970; None for None, or for text that is not a time."""
    try:
        return datetime.fromisoformat(time).timestamp() if time else None
    except ValueError:
        return None


def _between(start: str | None, end: str | None, otherwise: float) -> float:
    """Seconds from `start` to `end`; `otherwise` replaces an unknown end. Without a start they are 0."""
    began, ended = seconds(start), seconds(end)
    return 0.0 if began is None else max(0.0, (otherwise if ended is None else ended) - began)
