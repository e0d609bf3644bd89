"""`motley submit`: check on the login node what can be, keep what is submitted, submit. Imports no torch.

<run directory>/slurm/1/        of the first submission, and so on
    config.json, profile.json   as resolved: what the ranks are given, and what the site was taken to be
    job.sbatch                  as given to sbatch
    code.json, code.diff        the commit of the checkout, and its difference to it
    job.json                    the job's id
<run directory>/slurm/job_<id>.out, attempts.jsonl   written by the job: its output, and a line per attempt
"""

import fcntl
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_pipeline.shards import write_json
from data_pipeline.toml_config import ConfigError
from pretrain.config import RunConfig, load
from pretrain.run_checks import check_run
from pretrain.run_dir import check_config, check_writable, code_state, finished_step
from slurm.profile import Profile, load_profile
from slurm.script import render, sbatch_options

FOLDER, ATTEMPTS, JOB = "slurm", "attempts.jsonl", "job.json"
POLL_S = 10.0


def submit(
    run_path: str | Path,
    overrides: Sequence[str] = (),
    *,
    profile_path: str | Path,
    nodes: int | None = None,
    dry_run: bool = False,
    wait: bool = False,
    poll_s: float = POLL_S,
) -> int:
    """Submit a run, or print its script (`dry_run`, which needs no Slurm and writes nothing): the exit code.

    `wait`: stay until the job has ended for good, and return its exit code. Raises ConfigError, one message,
    for whatever would keep the run from starting, and if a job of the run is queued or running.
    """
    config, profile = load(run_path, overrides), load_profile(profile_path, nodes=nodes)
    check_config(config)
    if (step := finished_step(config)) is not None:
        print(f"{config.run_dir} is done: {step} of {config.num_steps} steps. name=... starts another run")
        return 0
    if not dry_run and shutil.which("sbatch") is None:
        raise ConfigError(
            "sbatch is not on the PATH: this machine has no Slurm. Submit from a login node, look at the "
            "script with --dry-run, or train on this machine with `motley train`"
        )
    check_run(config, profile.world_size)
    folder = config.run_dir.absolute() / FOLDER
    if dry_run:
        print(_script(config, profile, folder / str(_next_number(folder))), end="")
        return 0
    with _only_one(config, folder):
        if (job := _last_job(folder)) is not None and (state := _state_in_queue(job, config.name)):
            raise ConfigError(
                f"{config.run_dir} has job {job}, which is {state}: a run has one job at a time. "
                f"Wait for it, `scancel {job}`, or give this run another name=..."
            )
        check_writable(config)
        job = _submit(config, profile, folder)
    print(_where_to_look(config, profile, job), flush=True)
    return _wait(folder, job, poll_s) if wait else 0


def _script(config: RunConfig, profile: Profile, submission: Path) -> str:
    return render(
        profile,
        name=config.name,
        run_dir=config.run_dir.absolute(),
        config=submission / "config.json",
        folder=Path.cwd(),
        python=sys.executable,
    )


def _submit(config: RunConfig, profile: Profile, folder: Path) -> int:
    """Write the submission's folder and give its script to sbatch; nothing stays if that refuses."""
    submission = folder / str(_next_number(folder))
    try:
        submission.mkdir()
        write_json(submission / "config.json", config.model_dump(mode="json"))
        write_json(submission / "profile.json", profile.model_dump(mode="json"))
        commit, diff = code_state()
        write_json(submission / "code.json", {"commit": commit, "changed": bool(diff)})
        (submission / "code.diff").write_text(diff)
        script = submission / "job.sbatch"
        script.write_text(_script(config, profile, submission))
        # The header says the same, but the user's SBATCH_... variables would go before it.
        options = sbatch_options(
            profile, name=config.name, run_dir=config.run_dir.absolute(), folder=Path.cwd()
        )
        done = _ask("sbatch", "--parsable", *options, str(script))
        if done.returncode:
            raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
        job = int(done.stdout.strip().partition(";")[0])
        write_json(
            submission / JOB, {"job": job, "submitted": datetime.now(UTC).isoformat(timespec="seconds")}
        )
    except BaseException as error:
        shutil.rmtree(submission, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(f"{submission}: cannot be written: {error}") from None
        raise
    return job


@contextmanager
def _only_one(config: RunConfig, folder: Path) -> Iterator[None]:
    """Keep a second `motley submit` of the run out while this one looks and submits."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise ConfigError(
            f"{config.run_dir}: cannot be written: {error}; set runs_dir=... to a folder that can"
        ) from None
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{config.run_dir}: another `motley submit` is at it") from None
        yield


def _next_number(folder: Path) -> int:
    return 1 + max((int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit()), default=0)


def _last_job(folder: Path) -> int | None:
    """Id of the run's last job; None if it has had none."""
    number = _next_number(folder) - 1
    try:
        return json.loads((folder / str(number) / JOB).read_text())["job"]
    except FileNotFoundError:
        return None


def _ask(*command: str) -> "subprocess.CompletedProcess[str]":
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}") from None


def _state_in_queue(job: int, name: str) -> str | None:
    """The job's state, such as "PENDING", while it is in the queue; else None. Slurm uses ids again: the name
    must be ours."""
    done = _ask("squeue", "--noheader", f"--jobs={job}", "--format=%T %j")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue does not say whether job {job} is queued: {done.stderr.strip()}")
    state, _, found = done.stdout.strip().partition(" ")
    return state if state and found == name else None


def _where_to_look(config: RunConfig, profile: Profile, job: int) -> str:
    run_dir = config.run_dir
    size = f"{profile.nodes} x {profile.ranks_per_node} ranks"
    return (
        f"job {job}: {config.name} on {size}, {profile.time_limit} an attempt, "
        f"{profile.max_requeues} requeues at most\n"
        f"  queue     squeue -j {job}\n"
        f"  output    {run_dir / FOLDER / f'job_{job}.out'}\n"
        f"  attempts  {run_dir / FOLDER / ATTEMPTS}\n"
        f"  ranks     {run_dir / 'logs' / f'job_{job}_attempt_0'}\n"
        f"  metrics   {run_dir / 'metrics.jsonl'}\n"
        f"  stop      scancel {job}"
    )


def _wait(folder: Path, job: int, poll_s: float) -> int:
    """Stay until the job is out of the queue, telling of each attempt; the exit code of its last one.

    The queue is asked and not `sbatch --wait`, which looks ever more seldom (138 s for a job of 114 s).
    """
    told: list[dict[str, Any]] = []
    name = json.loads((folder / str(_next_number(folder) - 1) / "config.json").read_text())["name"]
    queued = True
    while queued:
        time.sleep(poll_s)
        queued = _state_in_queue(job, name) is not None
        attempts = [attempt for attempt in read_attempts(folder) if attempt["job"] == job]
        for attempt in attempts[len(told) :]:
            print(
                f"job {job}, attempt {attempt['attempt']}: {attempt['next']}: {attempt['reason']}", flush=True
            )
        told = attempts
    if not told or told[-1]["next"] == "requeued":
        print(
            f"job {job} left the queue and no record: cancelled, or its first node was lost", file=sys.stderr
        )
        return 1
    return told[-1]["exit_code"]


def read_attempts(folder: Path) -> list[dict[str, Any]]:
    """What jobs of a run recorded, a row an attempt that came to its end; oldest first."""
    path = folder / ATTEMPTS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
