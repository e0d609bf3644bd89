import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig
from slurm.profile import Profile
from slurm.records import Attempt, append
from slurm.submit.run import write_submission
from slurm.supervise.job import Job, environment, open_job, srun_command
from tests.pretrain.tiny_data import tiny_run


def opened(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: Sequence[Attempt] = (),
    *,
    task: bool = False,
    **profile: Any,
) -> Job:
    """Job 812, the second of a chain of three (or an element of an array) of a run at step 8."""
    submission = folder / "runs" / "tiny" / "slurm" / "1"
    submission.mkdir(parents=True)
    for each in rows:
        append(submission.parent, each)
    (folder / "runs" / "tiny" / "checkpoints" / "step_00000008").mkdir(parents=True)
    values = {"tasks_per_node": 2, "time_limit": "1:00:00", "max_requeues": 0, **profile}
    write_submission(
        submission,
        validate(RunConfig, tiny_run(folder, folder / "runs"), source="run"),
        validate(Profile, values, source="profile"),
    )
    job = {"job": 811, "task": None, "chain": [812, 813], "name": "tiny"}
    (submission / "job.json").write_text(json.dumps(job))
    monkeypatch.setenv("SLURM_JOB_ID", "812")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[1-2]")
    if not task:
        return open_job(submission)
    (folder / "elements.json").write_text(json.dumps(["nowhere", str(submission)]))
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "800")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    return open_job(folder)


def row(job: int, following: str, task: int | None = None, kind: str | None = None) -> dict[str, Any]:
    cause = None if kind is None else {"kind": kind}
    return {"job": job, "task": task, "attempt": 0, "next": following, "cause": cause}


def test_a_job_of_a_chain_knows_those_before_and_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(700, "requeued"), row(811, "chained")]  # the first is of an earlier submission
    job = opened(tmp_path, monkeypatch, rows, chain=3)
    assert (job.jobs, job.followers, job.from_step) == ([811, 812, 813], [813], 8)
    assert (job.budget.chain, job.budget.followers, job.budget.requeues) == (3, 1, 0)
    assert job.earlier == rows and job.own == rows[1:]
    assert job.attempt_dir == tmp_path / "runs" / "tiny" / "logs" / "job_812_attempt_0"


def test_an_element_of_an_array_is_told_from_its_neighbours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    causes = (("requeued", "killed"), ("requeued", "preempted"), ("lost", None))
    rows = [row(800, following, 1, kind) | {"attempt": k} for k, (following, kind) in enumerate(causes)]
    job = opened(tmp_path, monkeypatch, [*rows, row(800, "lost", 0)], task=True, max_requeues=5)
    assert (job.facts.name, job.facts.own_id, job.jobs, job.followers) == ("800_1", 812, [800], [])
    assert job.budget.requeues == 2  # a preemption does not count
    assert job.attempt_dir.name == "job_800_1_attempt_0"


def test_what_starts_and_what_it_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    job = opened(tmp_path, monkeypatch, cpus_per_task=3, python="py", env={"MASTER_PORT": "9", "A": "b"})
    assert srun_command(job, "parallel.node_check", Path("/spec"), ["node1", "node2"], 1) == [
        *("srun", "--nodes=2", "--nodelist=node1,node2", "--ntasks=2", "--ntasks-per-node=1"),
        *("--cpus-per-task=3", "py", "-m", "parallel.node_check", "/spec"),
    ]
    found = environment(job, ["node1", "node2"])
    assert "RANK" not in found and found["MASTER_ADDR"] == "node1" and found["OMP_NUM_THREADS"] == "3"
    assert (found["MASTER_PORT"], found["A"]) == ("9", "b")  # the profile goes before
    assert found["MOTLEY_ATTEMPT_DIR"] == str(job.attempt_dir)
