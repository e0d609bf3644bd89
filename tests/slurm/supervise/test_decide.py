"""The table of what comes after an attempt. What scontrol and srun say is as seen on Slurm 22.05."""

from typing import Any

import pytest

from slurm.supervise.decide import End, RestartBudget, decide, decide_bad_nodes, ended_by_slurm, is_restarted

STEP = "slurmstepd: error: *** STEP 7.0 ON node1 CANCELLED AT 2026-11-22T05:29:34"
RUNNING = {"JobState": "RUNNING", "Reason": "None", "Restarts": "1"}


@pytest.mark.parametrize(
    ("job", "srun_log", "who", "restarts"),
    [
        (RUNNING, "srun: error: node1: task 0: Exited with exit code 85", None, False),
        ({}, "", None, False),  # the controller is away
        (RUNNING | {"JobState": "COMPLETING"}, f"{STEP} ***", "cancelled", False),
        (RUNNING | {"JobState": "COMPLETING", "Reason": "TimeLimit"}, "", "the time limit", False),
        (
            RUNNING | {"JobState": "COMPLETING", "Restarts": "2"},
            *(f"{STEP} DUE TO PREEMPTION ***", "preempted", True),
        ),
        # During the time that a site leaves to a job that it preempts.
        (RUNNING | {"PreemptTime": "2026-11-22T05:29:54"}, f"{STEP} ***", "preempted", False),
        (RUNNING | {"PreemptTime": "None"}, "", None, False),
        (
            RUNNING | {"JobState": "COMPLETING", "Restarts": "2"},
            *(f"{STEP} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "a lost node", True),
        ),
        (
            RUNNING | {"JobState": "COMPLETING", "Restarts": "2"},
            *(f"{STEP} DUE TO JOB REQUEUE ***", "a requeue from outside", True),
        ),
    ],
)
def test_who_ended_a_job(job: dict[str, str], srun_log: str, who: str | None, restarts: bool) -> None:
    assert ended_by_slurm(job, 1, srun_log) == who
    assert is_restarted(job, 1) == restarts


def budget(**changes: int) -> RestartBudget:
    return RestartBudget(**({"requeues": 0, "max_requeues": 2, "chain": 1, "followers": 0} | changes))


def end(**changes: Any) -> End:
    values = {"exit_code": 9, "kind": "error", "why": "why", "progress": True, "by_slurm": None}
    return End(**(values | {"restarts": False} | changes))


STOPPED = {"exit_code": 85, "kind": "stopped", "why": "stopped by a signal"}


@pytest.mark.parametrize(
    ("how", "left", "following", "reason"),
    [
        ({"exit_code": 0, "why": "all steps done"}, {}, "done", "all steps done"),
        (STOPPED, {}, "requeued", "stopped by a signal; requeue 1 of 2 at most"),
        ({}, {"requeues": 1}, "requeued", "why; requeue 2 of 2 at most"),
        ({}, {"requeues": 2}, "stopped", "why; not started again: the cap of 2 requeues is reached"),
        ({}, {"max_requeues": 0}, "stopped", "why; not started again: the cap of 0 requeues is reached"),
        ({"progress": False}, {}, "stopped", "why; not started again: no step was saved in this attempt"),
        ({"exit_code": 2}, {}, "stopped", "why; not started again: this is a mistake in what was asked"),
        ({"exit_code": 2, "kind": "data"}, {}, "stopped", "why; not started again: the data must be mended"),
        ({"kind": "disk"}, {}, "stopped", "why; not started again: make room, then submit it again"),
        (STOPPED | {"by_slurm": "cancelled"}, {}, "ended", "cancelled; stopped by a signal"),
        ({"by_slurm": "the time limit"}, {}, "requeued", "the time limit; why; requeue 1 of 2 at most"),
        (
            {"by_slurm": "preempted", "restarts": True, "progress": False},
            *({}, "requeued", "preempted; why; Slurm starts it again"),
        ),
        (
            {"by_slurm": "preempted", "progress": False},
            *({"requeues": 2}, "requeued", "preempted; why; requeued, which does not count"),
        ),
        (
            {"by_slurm": "preempted"},
            *({"max_requeues": 0}, "stopped"),
            "preempted; why; not started again: the cap of 0 requeues is reached",
        ),
        (
            {"by_slurm": "a lost node", "restarts": True},
            *({}, "requeued", "a lost node; why; Slurm starts it again"),
        ),
        # In a chain of three: the first, and the last.
        (
            STOPPED,
            *({"max_requeues": 0, "chain": 3, "followers": 2}, "chained"),
            "stopped by a signal; goes on in job 2 of a chain of 3",
        ),
        (
            STOPPED,
            *({"max_requeues": 0, "chain": 3}, "stopped"),
            "stopped by a signal; not started again: the chain of 3 is used up",
        ),
        (
            {"progress": False},
            *({"max_requeues": 0, "chain": 3, "followers": 2}, "stopped"),
            "why; not started again: no step was saved in this attempt",
        ),
    ],
)  # fmt: skip
def test_what_comes_next(how: dict[str, Any], left: dict[str, int], following: str, reason: str) -> None:
    assert decide(end(**how), budget(**left)) == (following, reason)


def test_bad_nodes_need_no_progress_but_are_counted() -> None:
    assert decide_bad_nodes("why", 2, 2, budget()) == ("requeued", "why; requeue 1 of 2 at most")
    assert decide_bad_nodes("why", 3, 2, budget())[0] == "stopped"
    assert decide_bad_nodes("why", 1, 2, budget(requeues=2))[0] == "stopped"
    assert decide_bad_nodes("why", 1, 2, budget(max_requeues=0, chain=2, followers=1))[0] == "chained"
