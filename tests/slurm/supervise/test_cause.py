"""From what ranks and srun leave to one cause. What srun 22.05, gloo and the store say is what real ones
printed; NCCL's, CUDA's and Slurm 24.11's words, those of a lost node and of a cgroup's oom-kill are written
from memory."""

import json
from pathlib import Path
from typing import Any

import pytest

from parallel.rank_end import rank_ends
from slurm.supervise.cause import Cause, find_cause

ABORTED = (
    "srun: Job step aborted: Waiting up to 12 seconds for job step to finish.\n"
    "slurmstepd: error: *** STEP 812.0 ON node1 CANCELLED AT 2026-11-22T05:11:21 ***\n"
)
GLOO = "[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.1.2]:40110"
WATCHDOG = (
    "[rank0]:[E1122 05:11 ProcessGroupNCCL.cpp:683] [Rank 0] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=12, OpType=ALLREDUCE) ran for 600012 milliseconds before timing out.\nterminate called\n"
)


def record(
    rank: int, kind: str, message: str = "m", *, time: float = 0.0, exit_code: int = 1
) -> dict[str, Any]:
    end = {"rank": rank, "host": f"node{rank + 1}", "exit_code": exit_code, "kind": kind, "message": message}
    return end | {"time": time, "step": 7 if kind in ("done", "stopped") else None}


def cause(
    folder: Path,
    srun_log: str = "",
    *records: dict[str, Any],
    logs: dict[int, str] | None = None,
    world_size: int = 2,
    srun_code: int = 1,
    hang: str | None = None,
) -> Cause:
    for end in records:
        (folder / f"rank{end['rank']}.end.json").write_text(json.dumps(end).ljust(2048))
    for rank, text in (logs or {}).items():
        (folder / f"rank{rank}.log").write_text(text)
    return find_cause(folder, world_size, srun_log, srun_code, hang=hang)


def test_records_are_read_by_rank_and_half_ones_are_not(tmp_path: Path) -> None:
    for rank in (10, 2):
        (tmp_path / f"rank{rank}.end.json").write_text(json.dumps(record(rank, "done")).ljust(2048))
    (tmp_path / "rank3.end.json.tmp").write_text(" " * 2048)
    (tmp_path / "rank4.end.json").write_text(" " * 2048)
    assert [end["rank"] for end in rank_ends(tmp_path)] == [2, 10]


def test_the_earliest_failure_counts_and_lost_peers_do_not(tmp_path: Path) -> None:
    found = cause(
        tmp_path,
        f"srun: error: node1: task 0: Exited with exit code 1\n{ABORTED}srun: error: node2: task 1: Killed\n",
        record(0, "lost_peer", GLOO, time=1.0),
        record(2, "out_of_memory", "CUDA out of memory. Tried to allocate 2.00 GiB", time=3.0),
        record(1, "data", "train-000003.tar: truncated", time=2.0, exit_code=2),
        world_size=4,
    )
    assert found == Cause("data", 1, "node2", "train-000003.tar: truncated", 2)
    assert found.sentence == "rank 1 on node2: data: train-000003.tar: truncated"


def test_of_an_error_that_all_ranks_raise_the_named_rank_is_the_cause(tmp_path: Path) -> None:
    message = "step 7 is not finite: rank 1, micro-batch 0: text loss nan; samples a, b"
    ends = [record(rank, "non_finite", message, time=float(rank)) for rank in range(3)]
    found = cause(tmp_path, "", *ends, world_size=3)
    assert (found.rank, found.host) == (1, "node2")
    assert found.sentence == f"rank 1 on node2: non finite: {message}"


Silent = tuple[str, dict[int, str], tuple[str, int | None, str | None, str, int]]
WITHOUT_RECORDS: dict[str, Silent] = {
    "killed from outside": (
        f"srun: error: node2: task 1: Killed\n{ABORTED}srun: error: node1: task 0: Exited with exit code 1\n",
        {},
        ("killed", 1, "node2", "by SIGKILL from the kernel", 137),
    ),
    "killed by the kernel, 22.05": (
        "slurmstepd: error: Detected 1 oom-kill event(s) in StepId=812.0. Some of your processes may have "
        "been killed by the cgroup out-of-memory handler.\nsrun: error: node2: task 1: Killed\n",
        {},
        ("out_of_memory", 1, "node2", "Detected 1 oom-kill event(s)", 137),
    ),
    "killed by the kernel, told in the rank's log": (
        "srun: error: node2: task 1: Killed\n",
        {1: "slurmstepd: error: Detected 1 oom_kill event in StepId=812.0. Some of the step tasks have been"},
        ("out_of_memory", 1, "node2", "Detected 1 oom_kill event", 137),
    ),
    "killed by the kernel, 24.11": (
        "srun: error: node2: task 1: Out Of Memory\nsrun: Terminating StepId=812.0\n",
        {},
        ("out_of_memory", 1, "node2", "Out Of Memory", 137),
    ),
    "a crash in C": (
        "srun: error: node2: task 1: Segmentation fault (core dumped)\n",
        {1: "step 3\nFatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n x\n"},
        ("killed", 1, "node2", "(core dumped): Fatal Python error: Segmentation fault", 139),
    ),
    "an error before training could catch it": (
        "srun: error: node[1-2]: tasks 0-1: Exited with exit code 1\n",
        {0: "Traceback ...\nModuleNotFoundError: No module named 'deepspeed'\n"},
        ("error", 0, None, "code 1: ModuleNotFoundError: No module named 'deepspeed'", 1),
    ),
    "no such program": (
        "srun: error: node1: task 0: Exited with exit code 2\n",
        {0: "slurmstepd: error: execve(): /opt/python: No such file or directory\n"},
        ("launch", 0, "node1", "execve(): /opt/python: No such file or directory", 2),
    ),
    "NCCL's watchdog on all ranks": (
        "srun: error: node1: task 0: Aborted (core dumped)\n"
        "srun: error: node2: task 1: Aborted (core dumped)\n",
        {0: WATCHDOG, 1: WATCHDOG},
        ("lost_peer", 0, "node1", "Watchdog caught collective operation timeout", 134),
    ),
    "NCCL's watchdog because of a rank that was killed": (
        "srun: error: node1: task 0: Aborted (core dumped)\nsrun: error: node2: task 1: Killed\n",
        {0: WATCHDOG},
        ("killed", 1, "node2", "by SIGKILL", 137),
    ),
    "memory out where nothing could be raised any more": (
        "srun: error: node1: task 0: Aborted\n",
        {0: "terminate called after throwing an instance of 'std::bad_alloc'\n"},
        ("out_of_memory", 0, "node1", "std::bad_alloc", 134),
    ),
    "a lost node": (
        f"{ABORTED}srun: error: Node failure on node2\nsrun: error: node1: task 0: Terminated\n",
        {},
        ("lost_node", None, "node2", "Node failure on node2", 1),
    ),
    "a step that was not made": (
        "srun: error: Unable to create step for job 812: Requested nodes are busy\n",
        {},
        ("launch", None, None, "Unable to create step for job 812", 1),
    ),
    "a node that did not start its task": (
        "srun: error: Task launch for StepId=812.0 failed on node node3: Communication connection failure\n"
        f"srun: error: Application launch failed: Communication connection failure\n{ABORTED}"
        "srun: error: node1: task 0: Terminated\n",
        {},
        ("launch", None, "node3", "failed on node node3: Communication connection failure", 1),
    ),
    "a signal to stop before ranks listened": (
        "srun: error: node1: task 0: User defined signal 2\nsrun: error: node2: task 1: Killed\n",
        {},
        ("stopped", None, None, "stopped by a signal, before training could listen", 85),
    ),
    "words that nobody knows": (
        "srun: error: a new message\n",
        {},
        ("error", None, None, "srun ended with code 1: srun: error: a new message", 1),
    ),
    "no words": ("", {}, ("error", None, None, "srun ended with code 1", 1)),
}


@pytest.mark.parametrize("case", WITHOUT_RECORDS)
def test_without_records(tmp_path: Path, case: str) -> None:
    srun_log, logs, (kind, rank, host, words, exit_code) = WITHOUT_RECORDS[case]
    found = cause(tmp_path, srun_log, logs=logs)
    assert (found.kind, found.rank, found.host, found.exit_code) == (kind, rank, host, exit_code), found
    assert words in found.message and "\n" not in found.sentence


def test_a_rank_that_others_lost_is_the_cause_even_if_srun_is_silent(tmp_path: Path) -> None:
    others = [record(rank, "lost_peer", GLOO, time=float(rank)) for rank in (0, 2, 3)]
    found = cause(tmp_path, "srun: error: node1: task 0: Exited with exit code 1\n", *others, world_size=4)
    assert (found.kind, found.rank, found.exit_code) == ("killed", 1, 137)


def test_lost_peers_alone_are_a_lost_peer(tmp_path: Path) -> None:
    ends = [record(0, "lost_peer", GLOO, time=2.0), record(1, "lost_peer", "later", time=1.0)]
    ended = "srun: error: node1: task 0: Exited with exit code 1\n"
    assert cause(tmp_path, ended, *ends) == Cause("lost_peer", 1, "node2", "later", 1)


def test_all_stopped(tmp_path: Path) -> None:
    ends = [record(rank, "stopped", "SIGUSR2", exit_code=85) for rank in range(2)]
    found = cause(
        tmp_path, "srun: error: node[1-2]: tasks 0-1: Exited with exit code 85\n", *ends, srun_code=85
    )
    assert found == Cause("stopped", None, None, "stopped by a signal, after a checkpoint", 85)
    assert found.sentence == found.message


def test_one_that_fails_after_its_work(tmp_path: Path) -> None:
    ends = [record(rank, "done", exit_code=0) for rank in range(2)]
    found = cause(tmp_path, "srun: error: node2: task 1: Segmentation fault\n", *ends, srun_code=139)
    assert (found.kind, found.rank, found.exit_code) == ("error", 1, 139)


def test_a_hang_unless_a_rank_said_why(tmp_path: Path) -> None:
    killed = f"{ABORTED}srun: error: node[1-2]: tasks 0-1: Killed\n"
    found = cause(tmp_path, killed, srun_code=137, hang="no step for 1800 s")
    assert found == Cause("hang", None, None, "no step for 1800 s", 137)
    found = cause(tmp_path, killed, record(1, "out_of_memory"), hang="no step for 1800 s")
    assert found.kind == "out_of_memory"


def test_a_sentence_is_one_short_line() -> None:
    assert len(Cause("error", 3, "node2", "x" * 400, 1).sentence) == 300


def test_a_rank_that_left_without_a_checkpoint_says_so(tmp_path: Path) -> None:
    why = "SIGTERM: left in its step after 9 s, without a checkpoint"
    left = record(0, "stopped", why, exit_code=85) | {"step": None}
    code_85 = "srun: error: node1: task 0: Exited with exit code 85\n"
    for srun_log in ("", f"{code_85}{ABORTED}srun: error: node2: task 1: Killed\n"):
        assert cause(tmp_path, srun_log, left) == Cause("stopped", 0, "node1", why, 85)
    # The rank that was killed first stays the cause of the end of another, which left because of it.
    found = cause(tmp_path, f"srun: error: node2: task 1: Killed\n{ABORTED}{code_85}", left)
    assert (found.kind, found.rank, found.exit_code) == ("killed", 1, 137)
