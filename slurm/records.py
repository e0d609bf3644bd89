"""What `motley submit` and jobs leave in a run directory, and how it is read. Imports no torch.

<run directory>/slurm/<n>/          a submission: config.json, profile.json, job.json (written last), ...
<run directory>/slurm/attempts.jsonl   a row when an attempt starts and another when it ends
"""

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pretrain.checkpoint.folder import checkpoints
from pretrain.run_files import CHECKPOINTS

FOLDER, ATTEMPTS, JOB = "slurm", "attempts.jsonl", "job.json"
ELEMENTS = "elements.json"
"""Of an array's owner: by index, the submissions of its runs."""

Attempt = dict[str, Any]
"""One attempt of a job:
    job, task (index in an array, or None), attempt, nodes (Slurm's list), world_size
    submitted (of a requeue: when it went back to the queue), started, ended    UTC; None: not yet
    from_step, to_step (newest checkpoint at either end), exit_code
    cause: {"kind", "rank", "host", "message"} or None; ranks: [{"rank", "host", "exit_code", "kind"}]
    excluded: nodes that its check of nodes found bad
    next: running, done, requeued, chained, stopped, ended (by Slurm or a person), lost (it never said how)
    reason: a sentence for people
"""


def append(folder: Path, row: Attempt) -> None:
    """Add a row to `folder`/attempts.jsonl, on disk before this returns. Raises OSError."""
    text = f"{json.dumps(row, ensure_ascii=False)}\n".encode()
    file = os.open(folder / ATTEMPTS, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # A disk that was full may have left half a row: this one must not become part of it.
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = b"\n" + text
        if os.write(file, text) < len(text):  # in one write, so that nobody reads half a row
            raise OSError(f"{folder / ATTEMPTS}: no space for another row")
        os.fsync(file)
    finally:
        os.close(file)


def read_attempts(folder: Path) -> list[Attempt]:
    """The last row of every attempt of a run's jobs, in the order in which they began."""
    try:
        lines = (folder / ATTEMPTS).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows: dict[tuple[int, int | None, int], Attempt] = {}
    for line in lines:
        try:
            row = json.loads(line)
            rows[row["job"], row["task"], row["attempt"]] = row
        except (ValueError, KeyError, TypeError):  # being written, or cut short by a full disk
            continue
    return list(rows.values())


def submissions(folder: Path) -> list[Path]:
    """Numbered folders whose jobs were taken by Slurm, oldest first."""
    numbers = sorted(int(path.parent.name) for path in folder.glob(f"*/{JOB}") if path.parent.name.isdigit())
    return [folder / str(number) for number in numbers]


def last_submission(folder: Path) -> Path | None:
    """The newest of `submissions`, None if there is none."""
    return next(reversed(submissions(folder)), None)


def read_job(submission: Path) -> dict[str, Any]:
    """job.json of a submission: {"job", "task" (index in an array, or None), "chain" (the jobs that follow),
    "name" (that Slurm has for it: the run's, or the comparison's), "submitted"}."""
    return json.loads((submission / JOB).read_text())


def job_names(submission: Path) -> list[str]:
    """What squeue and scancel call the jobs of a submission: ["812"], of a chain all, of an array's element
    ["812_3"]."""
    return names_of(read_job(submission))


def names_of(job: Mapping[str, Any]) -> list[str]:
    """As `job_names`, of the content of a job.json."""
    if job["task"] is not None:
        return [f"{job['job']}_{job['task']}"]
    return [str(each) for each in (job["job"], *job["chain"])]


def report_name(comparison: str) -> str:
    """What Slurm calls the job that reports on a comparison."""
    return f"{comparison}-report"


def saved_step(run_dir: Path) -> int:
    """Step of the newest checkpoint, 0 if there is none."""
    return max((step for step, _ in checkpoints(run_dir / CHECKPOINTS)), default=0)


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def read_json(path: Path) -> dict[str, Any]:
    """{} for what is not there, or is not (yet) a JSON object."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
