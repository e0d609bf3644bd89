"""The job that a supervisor is of: what was submitted, what came before, and how srun starts tasks of it."""

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
from slurm.supervise.decide import PREEMPTED, Allowed

_SUBMITTER_S = 60.0
"""A job may start before `motley submit` has submitted those that follow it."""


@dataclass(frozen=True)
class Job:
    """This attempt, as it stays from its beginning to its end."""

    facts: JobFacts
    submission: Path
    config: RunConfig
    profile: Profile
    earlier: Sequence[Attempt]
    """Of the run's jobs."""
    jobs: Sequence[int]
    """The chain that this job is of; itself alone outside of one."""
    from_step: int

    @property
    def records(self) -> Path:
        return self.submission.parent

    @property
    def run_dir(self) -> Path:
        return self.records.parent

    @property
    def attempt_dir(self) -> Path:
        return self.run_dir / LOGS / attempt_logs(self.facts.name, self.facts.attempt)

    @property
    def own(self) -> list[Attempt]:
        """Earlier attempts of this submission."""
        return [row for row in self.earlier if row["job"] in self.jobs and row["task"] == self.facts.task]

    @property
    def followers(self) -> list[int]:
        return list(self.jobs[self.jobs.index(self.facts.job) + 1 :])

    @property
    def allowed(self) -> Allowed:
        return Allowed(
            requeues=sum(
                row["next"] in ("requeued", "lost") and (row["cause"] or {}).get("kind") != PREEMPTED
                for row in self.own
            ),
            max_requeues=self.profile.max_requeues,
            chain=len(self.jobs),
            followers=len(self.followers),
        )


def open_job(folder: Path) -> Job:
    """The job that this process is of. `folder`: a submission, or an array owner's, whose elements.json lists
    submissions. Raises LaunchError outside of a job, ConfigError or OSError for what cannot be read."""
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
    """srun of `module` on some of the job's nodes; its own further options go behind its name."""
    words, command = task_command(job.profile, module, argument, folder=Path.cwd(), python=sys.executable)
    return [
        *("srun", f"--nodes={len(nodes)}", f"--nodelist={','.join(nodes)}"),
        *(f"--ntasks={len(nodes) * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"),
        f"--cpus-per-task={job.profile.cpus_per_task}",
        *words,
        *command,
    ]


def environment(job: Job, nodes: Sequence[str]) -> dict[str, str]:
    """What each task finds: where ranks meet, and what the profile sets."""
    own = {
        "MASTER_ADDR": nodes[0],
        "MASTER_PORT": str(15_000 + job.facts.own_id % 15_000),
        "MOTLEY_ATTEMPT_DIR": str(job.attempt_dir),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": str(job.profile.cpus_per_task),
    }
    return child_environment(1) | own | job.profile.env
