"""Run directories as jobs leave them, without a job."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig
from tests.pretrain.tiny_data import tiny_run

HOUR = "2026-01-01T{:02d}:{:02d}:00+00:00"


def at(minute: int) -> str:
    """Minutes after midnight, UTC, of a day long ago."""
    return HOUR.format(*divmod(minute, 60))


def attempt(job: int = 812, number: int = 0, **changes: Any) -> dict[str, Any]:
    """A row of attempts.jsonl: two minutes in the queue, ten minutes of work."""
    begins = 2 + 20 * number
    row = {"job": job, "task": None, "attempt": number, "nodes": "node[1-2]", "world_size": 4}
    row |= {"submitted": at(begins - 2), "started": at(begins), "ended": at(begins + 10)}
    row |= {
        "from_step": 10 * number,
        "to_step": 10 * number + 10,
        "exit_code": 85,
        "cause": None,
        "ranks": [],
    }
    return row | {"excluded": [], "next": "requeued", "reason": "the time limit; requeue 1 of 2"} | changes


def running(job: int = 812, number: int = 0, **changes: Any) -> dict[str, Any]:
    """The row of an attempt that goes on."""
    going = {"ended": None, "to_step": None, "exit_code": None, "next": "running", "reason": ""}
    return attempt(job, number, **(going | changes))


def write_run(
    runs_dir: Path,
    *,
    name: str = "tiny",
    job: dict[str, Any] | None = None,
    attempts: Sequence[dict[str, Any]] = (),
    steps: int = 0,
    record: dict[str, Any] | None = None,
    **config: Any,
) -> RunConfig:
    """runs_dir/name: a submission as `job` (what job.json says over the usual), rows of attempts, a row of
    metrics every 2 steps of 1.5 s, record.json."""
    values = tiny_run(runs_dir / "data", runs_dir) | {"name": name} | config
    values["every_steps"] = {"log": 2, "eval": 10, "checkpoint": 10}
    run = validate(RunConfig, values, source="test")
    run.run_dir.mkdir(parents=True)
    (run.run_dir / "config.resolved.json").write_text(run.model_dump_json())
    if job is not None:
        submission = run.run_dir / "slurm" / "1"
        submission.mkdir(parents=True)
        values = {"job": 812, "task": None, "chain": [], "submitted": at(0)} | job
        (submission / "job.json").write_text(json.dumps(values))
    if attempts:
        lines = "".join(json.dumps(row) + "\n" for row in attempts)
        (run.run_dir / "slurm" / "attempts.jsonl").write_text(lines)
    if steps:
        (run.run_dir / "metrics.jsonl").write_text("".join(map(_row, range(2, steps + 1, 2))))
    if record is not None:
        (run.run_dir / "record.json").write_text(json.dumps(record))
    return run


def _row(step: int) -> str:
    row = {"step": step, "train/loss": 3.25, "train/loss/text": 3.0, "train/loss/image": 3.5}
    row |= {
        "time/step_s": 1.0,
        "time/data_wait_s": 0.5,
        "time/train_s": 1.5 * step,
        "speed/tokens_per_s": 4096.0,
    }
    return json.dumps(row | ({"time/eval_s": 5.0} if step % 10 == 0 else {})) + "\n"
