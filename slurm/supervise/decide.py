"""The decision after an attempt of a job, as a pure function of its end and of the restart budget."""

from collections.abc import Mapping
from dataclasses import dataclass

from parallel.exit_codes import ExitCode

PREEMPTED = "preempted"


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    exit_code: int
    kind: str | None
    """The kind of the cause (slurm.supervise.cause); None if all steps are done."""
    why: str
    """The reason, as a sentence for people."""
    progress: bool
    """Whether a later step is saved than at the start of the attempt."""
    by_slurm: str | None
    """The result of `ended_by_slurm`."""
    restarts: bool
    """Whether Slurm has put the job back into the queue already."""


@dataclass(frozen=True)
class RestartBudget:
    """The remaining restarts of a job."""

    requeues: int
    """The number of requeues that are used up."""
    max_requeues: int
    """0: the site forbids requeues."""
    chain: int
    """The number of jobs in the chain; 1 without a chain."""
    followers: int
    """The number of jobs in the chain that wait for this one to end."""


def ended_by_slurm(job: Mapping[str, str], attempt: int, srun_log: str) -> str | None:
    """What ended the job, if ranks did not end by themselves: PREEMPTED, "the time limit", "a lost node",
    "a requeue from outside" or "cancelled"; None if the job still runs, or if Slurm did not answer.

    `job`: the fields of `scontrol show job`, {} if Slurm did not answer; `srun_log`: the messages of srun,
    the only place where Slurm 22.05 tells why a job restarts.
    """
    if job.get("PreemptTime", "None") != "None" or "DUE TO PREEMPTION" in srun_log:
        return PREEMPTED
    if not job or job["JobState"] == "RUNNING":  # after a warning of the time limit ranks end by themselves
        return None
    if job["Reason"] == "TimeLimit":
        return "the time limit"
    if "DUE TO NODE FAILURE" in srun_log:
        return "a lost node"
    return "a requeue from outside" if is_restarted(job, attempt) else "cancelled"


def is_restarted(job: Mapping[str, str], attempt: int) -> bool:
    """Whether Slurm has put the job back into the queue already."""
    return int(job.get("Restarts", 0)) > attempt


def decide(end: End, budget: RestartBudget) -> tuple[str, str]:
    """(next, reason): what comes next, as in the rows of slurm.records, and why, as a sentence for people."""
    if end.exit_code == ExitCode.DONE:
        return "done", end.why
    why = f"{end.by_slurm}; {end.why}" if end.by_slurm else end.why
    if end.restarts:
        return "requeued", f"{why}; Slurm starts it again"
    if end.by_slurm == "cancelled":
        return "ended", why
    if end.exit_code == ExitCode.USER_ERROR:
        cure = "the data must be mended" if end.kind == "data" else "this is a mistake in what was asked"
        return "stopped", f"{why}; not started again: {cure}"
    if end.kind == "disk":
        return "stopped", f"{why}; not started again: make room, then submit it again"
    if end.by_slurm == PREEMPTED:
        return _go_on(why, budget, counted=False)
    if not end.progress:
        return "stopped", f"{why}; not started again: no step was saved in this attempt"
    return _go_on(why, budget)


def decide_bad_nodes(why: str, excluded: int, max_excluded: int, budget: RestartBudget) -> tuple[str, str]:
    """`decide` for an attempt that found bad nodes before ranks were started.

    `excluded`: the number of nodes that the submission excludes, including these.
    """
    if excluded > max_excluded:
        cap = f"{excluded} nodes would be excluded, preflight.max_excluded = {max_excluded}"
        return "stopped", f"{why}; not started again: {cap}"
    return _go_on(why, budget)


def _go_on(why: str, budget: RestartBudget, *, counted: bool = True) -> tuple[str, str]:
    """(next, reason) of an attempt that may restart, within the budget. `counted`: it uses up a requeue."""
    if budget.followers:
        place = budget.chain - budget.followers + 1
        return "chained", f"{why}; goes on in job {place} of a chain of {budget.chain}"
    if budget.chain > 1:
        return "stopped", f"{why}; not started again: the chain of {budget.chain} is used up"
    if not counted and budget.max_requeues:
        return "requeued", f"{why}; requeued, which does not count"
    if budget.requeues >= budget.max_requeues:
        return "stopped", f"{why}; not started again: the cap of {budget.max_requeues} requeues is reached"
    return "requeued", f"{why}; requeue {budget.requeues + 1} of {budget.max_requeues} at most"
