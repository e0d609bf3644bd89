"""The supervised job: its submission, its earlier attempts, and the srun command that starts its tasks."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from parallel.launch import JobFacts, child_environment, job_facts
from pretrain.config import RunConfig, load
from pretrain.run_files import LOGS, attempt_logs
from slurm.profile import Profile, load_profile
from slurm.records import ELEMENTS, JOB, Attempt, read_attempts, read_job, saved_step
from slurm.script import task_command
from slurm.supervise.decide import PREEMPTED, RestartBudget

_SUBMITTER_S = 60.0
"""Seconds that a job waits for `motley submit` to submit the next jobs of its chain."""


@dataclass(frozen=True)
class Job:
    """The job and this attempt of it: facts that do not change while the attempt runs."""

    facts: JobFacts
    submission: Path
    config: RunConfig
    profile: Profile
    earlier: Sequence[Attempt]
    """The earlier attempts of all jobs of the run."""
    jobs: Sequence[int]
    """The ids of all jobs of the chain; without a chain, only of this job."""
    from_step: int

    @property
    def records(self) -> Path:
        """The folder of attempts.jsonl."""
        return self.submission.parent

    @property
    def run_dir(self) -> Path:
        return self.records.parent

    @property
    def attempt_dir(self) -> Path:
        return self.run_dir / LOGS / attempt_logs(self.facts.name, self.facts.attempt)

    @property
    def own(self) -> list[Attempt]:
        """The earlier attempts of this submission."""
        return [row for row in self.earlier if row["job"] in self.jobs and row["task"] == self.facts.task]

    @property
    def followers(self) -> list[int]:
        """The jobs of the chain after this one."""
        return list(self.jobs[self.jobs.index(self.facts.job) + 1 :])

    @property
    def budget(self) -> RestartBudget:
        return RestartBudget(
            requeues=sum(
                row["next"] in ("requeued", "lost") and (row["cause"] or {}).get("kind") != PREEMPTED
                for row in self.own
            ),
            max_requeues=self.profile.max_requeues,
            chain=len(self.jobs),
            followers=len(self.followers),
        )


def open_job(folder: Path) -> Job:
    """The job in which this process runs.

    `folder`: the submission, or that of an array's comparison, whose elements.json lists submissions. Raises
    LaunchError outside of a job, and ConfigError or OSError for a file that cannot be read.
    """
    facts = job_facts()
    submission = folder
    if facts.task is not None:
        submission = Path(json.loads((folder / ELEMENTS).read_text())[facts.task])
    config, profile = load(submission / "config.json"), load_profile(submission / "profile.json")
    jobs = [facts.job]
    if profile.chain > 1:
        deadline = time.monotonic() + _SUBMITTER_S
        while not (submission / JOB).exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        values = read_job(submission)
        jobs = [values["job"], *values["chain"]]
    return Job(
        facts=facts,
        submission=submission,
        config=config,
        profile=profile,
        earlier=read_attempts(submission.parent),
        jobs=jobs,
        from_step=saved_step(submission.parents[1]),
    )


def srun_command(
    job: Job, module: str, argument: Path, nodes: Sequence[str], tasks_per_node: int
) -> list[str]:
    """The srun command that runs `module` on `nodes`; a caller may insert further options after "srun"."""
    words, command = task_command(job.profile, module, argument, folder=Path.cwd(), python=sys.executable)
    return [
        *("srun", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"),
        *(f"--ntasks={len(nodes) * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"),
        f"--cpus-per-task={job.profile.cpus_per_task}",
        *words,
        *command,
    ]


def environment(job: Job, nodes: Sequence[str]) -> dict[str, str]:
    """The environment of a task: the rendezvous of the ranks, and the variables of the profile."""
    own = {
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(15_000 + job.facts.own_id % 15_000),
        "MOTLEY_ATTEMPT_DIR": str(job.attempt_dir),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(job.profile.cpus_per_task),
    }
    return child_environment(1) | own | job.profile.env
