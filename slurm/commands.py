"""Asking and telling Slurm, by its commands. Imports no torch."""

import contextlib
import re
import shutil
import signal
import subprocess
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError

TIMEOUT_S = 120


class ControllerUnreachable(ConfigError):
    """Slurm's controller does not answer: it is updated, or moves. What was asked may be asked again."""


def ask(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands, its messages and times in one form. Raises ConfigError if it is missing
    or does not answer; its exit code is the caller's to look at."""
    return _run(command, "LC_ALL=C", "SLURM_TIME_FORMAT=standard")


def _run(command: Sequence[str], *variables: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which(command[0]) is None:
        raise ConfigError(f"{command[0]} is not on the PATH: this machine has no Slurm")
    try:
        return subprocess.run(
            ("env", *variables, *command),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            # At a requeue Slurm sends SIGTERM to all processes of a batch script: to this one too.
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}") from None


def _tell(*command: str) -> None:
    done = ask(*command)
    if done.returncode:
        raise _refusal(" ".join(command[:2]), done.stderr)


def _refusal(what: str, said: str) -> ConfigError:
    away = re.search(r"Unable to contact|Socket timed out|Zero Bytes|Connection (?:refused|reset)", said)
    return (ControllerUnreachable if away else ConfigError)(f"{what}: {said.strip()}")


def state_in_queue(job_name: str, name: str) -> str | None:
    """The state, such as "PENDING", of a job ("812"; an array's element: "812_3") while it is in the queue;
    else None. Slurm uses ids again: the job's own name must be `name`."""
    done = ask("squeue", "--noheader", f"--jobs={job_name}", "--format=%T %j")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue does not say whether job {job_name} is queued: {done.stderr.strip()}")
    found = (line.strip().partition(" ") for line in done.stdout.splitlines())
    return next((state for state, _, its_name in found if its_name == name), None)


@dataclass(frozen=True)
class Queued:
    """A job in the queue, as squeue has it."""

    state: str
    reason: str
    """Why it waits, such as "Priority"."""
    start: str
    """Local time at which Slurm expects it to start, or did start it; "N/A"."""
    name: str
    """The job's own name."""


def in_queue(job_names: Sequence[str]) -> dict[str, Queued]:
    """Those of `job_names` ("812", "812_3") that are in the queue, by one question."""
    if not job_names:
        return {}
    wanted = f"--jobs={','.join(job_names)}"
    done = ask("squeue", "--noheader", "--array", wanted, "--format=%i|%T|%r|%S|%j")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue: {done.stderr.strip()}")
    lines = (line.strip().split("|", 4) for line in done.stdout.splitlines())
    return {line[0]: Queued(*line[1:]) for line in lines if len(line) == 5}


def how_it_ended(job_name: str, names: Collection[str]) -> str | None:
    """Slurm's word for a job that is in the queue no more, such as "CANCELLED by 1000" or "NODE_FAIL": from
    accounting where there is one, else from the controller, which forgets it after a while; None if neither
    knows. `names`: what the job may be called; another's with its id is not meant."""
    with contextlib.suppress(ConfigError):
        columns = ("--noheader", "--parsable2", "--format=JobName,State")
        done = ask("sacct", "--allocations", f"--jobs={job_name}", *columns)
        for line in reversed(done.stdout.splitlines() if done.returncode == 0 else []):
            name, _, state = line.rpartition("|")
            if name in names:
                return state
    with contextlib.suppress(ConfigError):
        job = show_job(job_name)
        if job.get("JobName") in names:
            return job.get("JobState")
    return None


def kill_wait_s() -> int | None:
    """Seconds from SIGTERM to SIGKILL of a job that is cancelled or preempted; None: Slurm does not say."""
    with contextlib.suppress(ConfigError):
        found = re.search(r"^KillWait\s*=\s*(\d+)", ask("scontrol", "show", "config").stdout, re.MULTILINE)
        return int(found[1]) if found else None
    return None


def sbatch(options: Sequence[str], script: Path) -> int:
    """Submit; the job's id. Raises ConfigError with Slurm's own words if it refuses."""
    done = _run(("sbatch", "--parsable", *options, str(script)))  # not `ask`: a job inherits the environment
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return int(done.stdout.strip().partition(";")[0])


def cancel(job_names: Sequence[str]) -> None:
    """End jobs, pending or running."""
    _tell("scancel", *job_names)


def kill_steps(job_name: str) -> None:
    """SIGKILL to every process that srun has started for a job; its batch script lives on."""
    done = ask("squeue", "--noheader", "--steps", f"--jobs={job_name}", "--format=%i")
    steps = [step for step in done.stdout.split() if step.rpartition(".")[2].isdecimal()]
    if done.returncode:
        raise _refusal(f"squeue --steps --jobs={job_name}", done.stderr)
    if steps:
        _tell("scancel", "--signal=KILL", *steps)


def requeue(job_name: str) -> None:
    """Put a running job back into the queue, to start again."""
    _tell("scontrol", "requeue", job_name)


def exclude(job_name: str, nodes: Sequence[str]) -> None:
    """Keep a pending job off `nodes`, which replace those it was kept off before."""
    _tell("scontrol", "update", f"JobId={job_name}", f"ExcNodeList={','.join(nodes)}")


def hostnames(nodelist: str) -> list[str]:
    """The nodes of a list such as "gpu[3-5,9]", in its order."""
    done = ask("scontrol", "show", "hostnames", nodelist)
    if done.returncode:
        raise ConfigError(f"scontrol show hostnames {nodelist}: {done.stderr.strip()}")
    return done.stdout.split()


def show_job(job_name: str) -> dict[str, str]:
    """What `scontrol show job` says; {} if Slurm knows no such job. Raises ConfigError if it is not there."""
    done = ask("scontrol", "-o", "show", "job", job_name)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return {}
        raise _refusal(f"scontrol show job {job_name}", done.stderr)
    line = next(iter(done.stdout.splitlines()), "")
    return dict(item.split("=", 1) for item in line.split() if "=" in item)
