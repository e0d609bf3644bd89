"""Functions that call squeue, sacct, scontrol, sbatch and scancel. This module imports no torch."""

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
    """Slurm's controller does not answer, as while it is updated or moved. The command may be tried again."""


def ask(*command: str) -> "subprocess.CompletedProcess[str]":
    """Run one of Slurm's commands, with a fixed language and time format; the caller checks its exit code.

    Raises ConfigError if the command is missing or does not answer.
    """
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
            # At a requeue Slurm sends SIGTERM to all processes of a batch script, this one included.
            preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"{command[0]}: {error}") from None


def _tell(*command: str) -> None:
    done = ask(*command)
    if done.returncode:
        raise _refusal(" ".join(command[:2]), done.stderr)


def _refusal(command: str, stderr: str) -> ConfigError:
    unreachable = re.search(
        r"Unable to contact|Socket timed out|Zero Bytes|Connection (?:refused|reset)", stderr
    )
    return (ControllerUnreachable if unreachable else ConfigError)(f"{command}: {stderr.strip()}")


def state_in_queue(job_name: str, name: str) -> str | None:
    """The state of a job, such as "PENDING", or None if it is not in the queue.

    `job_name`: "812", or "812_3" for an element of an array. `name`: the job's own name, which is compared
    because Slurm reuses ids.
    """
    done = ask("squeue", "--noheader", f"--jobs={job_name}", "--format=%T %j")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue does not say whether job {job_name} is queued: {done.stderr.strip()}")
    rows = (line.strip().partition(" ") for line in done.stdout.splitlines())
    return next((state for state, _, own_name in rows if own_name == name), None)


@dataclass(frozen=True)
class Queued:
    """A job in the queue, as squeue prints it."""

    state: str
    reason: str
    """Why the job waits, such as "Priority"."""
    start: str
    """Local time at which the job started or is expected to start; "N/A" if Slurm does not know."""
    name: str
    """The job's own name."""


def in_queue(job_names: Sequence[str]) -> dict[str, Queued]:
    """The jobs of `job_names` ("812", "812_3") that are in the queue, by name; squeue is called once."""
    if not job_names:
        return {}
    done = ask("squeue", "--noheader", "--array", f"--jobs={','.join(job_names)}", "--format=%i|%T|%r|%S|%j")
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError(f"squeue: {done.stderr.strip()}")
    lines = (line.strip().split("|", 4) for line in done.stdout.splitlines())
    return {line[0]: Queued(*line[1:]) for line in lines if len(line) == 5}


def final_state(job_name: str, names: Collection[str]) -> str | None:
    """Slurm's final state of a job that has left the queue, such as "CANCELLED by 1000" or "NODE_FAIL".

    It comes from accounting (sacct) or, where a site has none, from the controller, which forgets jobs after
    a while; None if neither knows the job. `names`: the names that the job may have, because Slurm reuses
    ids.
    """
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
    """Seconds from SIGTERM to SIGKILL when a job is cancelled or preempted; None if Slurm does not tell."""
    with contextlib.suppress(ConfigError):
        config = ask("scontrol", "show", "config").stdout
        kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", config, re.MULTILINE)
        return int(kill_wait[1]) if kill_wait else None
    return None


def sbatch(options: Sequence[str], script: Path) -> int:
    """Submit a script; returns the job's id. Raises ConfigError with Slurm's message if it is refused."""
    done = _run(
        ("sbatch", "--parsable", *options, str(script))
    )  # a job inherits the environment, so not `ask`
    if done.returncode:
        raise ConfigError(f"sbatch refused the job: {done.stderr.strip()}")
    return int(done.stdout.strip().partition(";")[0])


def cancel(job_names: Sequence[str]) -> None:
    """Cancel jobs, pending or running."""
    _tell("scancel", *job_names)


def kill_steps(job_name: str) -> None:
    """Send SIGKILL to every process that srun has started for a job; its batch script goes on."""
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
    """Keep a pending job off `nodes`. They replace the nodes that it was kept off before."""
    _tell("scontrol", "update", f"JobId={job_name}", f"ExcNodeList={','.join(nodes)}")


def hostnames(nodelist: str) -> list[str]:
    """The names of the nodes in a list such as "gpu[3-5,9]", in its order."""
    done = ask("scontrol", "show", "hostnames", nodelist)
    if done.returncode:
        raise ConfigError(f"scontrol show hostnames {nodelist}: {done.stderr.strip()}")
    return done.stdout.split()


def show_job(job_name: str) -> dict[str, str]:
    """The fields of `scontrol show job`; {} for an unknown job. Raises ConfigError if Slurm cannot answer."""
    done = ask("scontrol", "-o", "show", "job", job_name)
    if done.returncode:
        if "Invalid job id" in done.stderr:
            return {}
        raise _refusal(f"scontrol show job {job_name}", done.stderr)
    line = next(iter(done.stdout.splitlines()), "")
    return dict(item.split("=", 1) for item in line.split() if "=" in item)
