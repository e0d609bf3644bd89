"""The files that `motley submit` and its jobs write into a run directory, and functions that read them.

<run directory>/slurm/<n>/          a submission: config.json, profile.json, job.json (written last), ...
<run directory>/slurm/attempts.jsonl   a row when an attempt starts and another when it ends

This module imports no torch.
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.files.json_file import read_object
from pretrain.checkpoint.folder import checkpoints
from pretrain.run_files import CHECKPOINTS

FOLDER, ATTEMPTS, JOB = "slurm", "attempts.jsonl", "job.json"
ELEMENTS = "elements.json"
"""File in a comparison's submission: a list that gives each index of the array the submission of its run."""

Attempt = dict[str, Any]
"""One attempt of a job, as a JSON object with these keys:
    job, task (index in an array, or None), attempt, nodes (Slurm's list), world_size submitted (or, after a
    requeue, back in the queue), started, ended    times in UTC; None: not yet from_step, to_step (step of the
    newest checkpoint at the start and at the end), exit_code cause: {"kind", "rank", "host", "message"} or
    None; ranks: [{"rank", "host", "exit_code", "kind"}] excluded: nodes that the check of nodes found bad
    next: running, done, requeued, chained, stopped, ended (by Slurm or a person), lost (it left no end
    record) reason: a sentence for people
"""


def append(folder: Path, row: Attempt) -> None:
    """Append a row to `folder`/attempts.jsonl and sync it to disk. Raises OSError if it cannot be written."""
    text = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    file = os.open(folder / ATTEMPTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        # A full disk may have left half a row, which must not swallow this one.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = b"\n" + text
        if os.write(file, text) < len(text):  # one write, so that no reader sees half a row
            raise OSError(f"{folder / ATTEMPTS}: no space for another row")
        os.fsync(file)
    finally:
        os.close(file)


def read_attempts(folder: Path) -> list[Attempt]:
    """The last row of every attempt of a run's jobs, in the order in which the attempts began."""
    try:
        lines = (folder / ATTEMPTS).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows: dict[tuple[int, int | None, int], Attempt] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[row["job"], row["task"], row["attempt"]] = row
        except (ValueError, KeyError, TypeError):  # the row is being written, or a full disk cut it short
            continue
    return list(rows.values())


def submissions(folder: Path) -> list[Path]:
    """The numbered folders whose jobs Slurm accepted, oldest first."""
    numbers = sorted(int(path.parent.name) for path in folder.glob(f"*/{JOB}") if path.parent.name.isdigit())
    return [folder / str(number) for number in numbers]


def last_submission(folder: Path) -> Path | None:
    """The newest folder of `submissions`; None if there is none."""
    return next(reversed(submissions(folder)), None)


def read_job(submission: Path) -> dict[str, Any]:
    """The content of a submission's job.json: {"job", "task", "chain", "name", "submitted"}.

    "task" is the index in an array, or None; "chain" lists the jobs that follow; "name" is Slurm's name of
    the job, which is the run's or the comparison's.
    """
    return read_object(submission / JOB, _JOB_FIELDS)


_JOB_FIELDS = {"job": int, "task": (int, type(None)), "chain": list, "name": str}


def job_names(submission: Path) -> list[str]:
    """The jobs of a submission, as squeue names them: ["812"], ["812_3"] in an array, or a chain's jobs."""
    return names_of(read_job(submission))


def names_of(job: Mapping[str, Any]) -> list[str]:
    """`job_names` for the content of a job.json."""
    if job["task"] is not None:
        return [f"{job['job']}_{job['task']}"]
    return [str(number) for number in (job["job"], *job["chain"])]


def report_name(comparison: str) -> str:
    """Slurm's name of the job that reports on a comparison."""
    return f"{comparison}-report"


def saved_step(run_dir: Path) -> int:
    """The step of the newest checkpoint; 0 if there is none."""
    return max((step for step, _ in checkpoints(run_dir / CHECKPOINTS)), default=0)


def now() -> str:
    """The time in UTC, as ISO text to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; {} if the file is missing or holds no whole JSON object (yet)."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
