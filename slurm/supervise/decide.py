"""What comes after an attempt of a job: a pure function of how it ended and of what the job may do."""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.exit_codes import ExitCode

PREEMPTED = "preempted"


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    exit_code: int
    kind: str | None
    """Of the cause (slurm.supervise.cause); None where all steps are done."""
    why: str
    """A sentence."""
    progress: bool
    """A later step is saved than at its start."""
    by_slurm: str | None
    """Of `ended_by_slurm`."""
    restarts: bool
    """Slurm has put the job back into the queue already."""


@dataclass(frozen=True)
class Allowed:
    """What is left of the ways in which a job goes on by itself."""

    requeues: int
    max_requeues: int
    """0: the site forbids them. `requeues` of them are used."""
    chain: int
    followers: int
    """Jobs of a chain of `chain` that wait for this one to end."""


def ended_by_slurm(job: Mapping[str, str], attempt: int, srun_log: str) -> str | None:
    """Who ended the job where ranks did not end by themselves: PREEMPTED, "the time limit", "a lost node",
    "a requeue from outside", "cancelled"; None if it goes on running, or if Slurm cannot be asked.

    `job`: what scontrol says of it; `srun_log`: only there Slurm 22.05 says why a job is to start again.
    """
    if job.get("PreemptTime", "None") != "None" or "DUE TO PREEMPTION" in srun_log:
        return PREEMPTED
    if not job or job["JobState"] == "RUNNING":  # a warning of the time limit among them: ranks just end
        return None
    if job["Reason"] == "TimeLimit":
        return "the time limit"
    if "DUE TO NODE FAILURE" in srun_log:
        return "a lost node"
    return "a requeue from outside" if is_restarted(job, attempt) else "cancelled"


def is_restarted(job: Mapping[str, str], attempt: int) -> bool:
    """Whether Slurm has put the job back into the queue already."""
    return int(job.get("Restarts", 0)) > attempt


def decide(end: End, allowed: Allowed) -> tuple[str, str]:
    """(what comes next, as in the rows of slurm.records; why, for people)."""
    if end.exit_code == ExitCode.DONE:
        return "done", end.why
    why = f"{end.by_slurm}; {end.why}" if end.by_slurm else end.why
    if end.restarts:
        return "requeued", f"{why}; Slurm starts it again"
    if end.by_slurm == "cancelled":
        return "ended", why
    if end.exit_code == ExitCode.USER_ERROR:
        return "stopped", f"{why}; not started again: this is a mistake in what was asked"
    if end.kind == "disk":
        return "stopped", f"{why}; not started again: make room, then submit it again"
    if end.by_slurm == PREEMPTED:
        return _go_on(why, allowed, counted=False)
    if not end.progress:
        return "stopped", f"{why}; not started again: no step was saved in this attempt"
    return _go_on(why, allowed)


def decide_bad_nodes(why: str, excluded: int, max_excluded: int, allowed: Allowed) -> tuple[str, str]:
    """As `decide`, of an attempt that found bad nodes before ranks were started. `excluded`: nodes of the
    submission until now, these among them."""
    if excluded > max_excluded:
        cap = f"{excluded} nodes would be excluded, preflight.max_excluded = {max_excluded}"
        return "stopped", f"{why}; not started again: {cap}"
    return _go_on(why, allowed)


def _go_on(why: str, allowed: Allowed, *, counted: bool = True) -> tuple[str, str]:
    if allowed.followers:
        place = allowed.chain - allowed.followers + 1
        return "chained", f"{why}; goes on in job {place} of a chain of {allowed.chain}"
    if allowed.chain > 1:
        return "stopped", f"{why}; not started again: the chain of {allowed.chain} is used up"
    if not counted and allowed.max_requeues:
        return "requeued", f"{why}; requeued, which does not count"
    if allowed.requeues >= allowed.max_requeues:
        return "stopped", f"{why}; not started again: the cap of {allowed.max_requeues} requeues is reached"
    return "requeued", f"{why}; requeue {allowed.requeues + 1} of {allowed.max_requeues} at most"
