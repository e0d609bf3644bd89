"""Where a run stands, from every state that files and queue can be found in."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest

from slurm.commands import Queued
from slurm.monitor import state
from slurm.monitor.state import LIVE, RunState, job_names, read_state, seconds
from slurm.monitor.targets import RunTarget
from tests.slurm.run_directories import at, attempt, running, write_run

NOW = seconds(at(60)) or 0.0


def queued(
    state: str = "PENDING", name: str = "tiny", reason: str = "Priority", start: str = "N/A"
) -> Queued:
    return Queued(state, reason, start, name)


def see(tmp_path: Path, queue: dict[str, Queued] | None, **run: Any) -> RunState:
    config = write_run(tmp_path, **run)
    return read_state(RunTarget(config.run_dir, config), queue, now=NOW)


@pytest.fixture
def slurm_says(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What Slurm knows of a job that left the queue; and what was asked."""
    answers: list[Any] = []

    def final_state(job: str, names: Any) -> str | None:
        assert set(names) >= {"tiny"}
        return answers.pop(0)

    monkeypatch.setattr(state, "final_state", final_state)
    return answers


def test_it_waits_and_why(tmp_path: Path) -> None:
    seen = see(tmp_path, {"812": queued(start="2026-01-01T02:00:00")}, job={})
    assert (seen.state, seen.job, seen.step, seen.goodput_frac) == ("queued", "812", 0, None)
    assert seen.waits == "Priority, expected to start at 2026-01-01T02:00:00 (local time)"
    assert seen.queue_wait_s == 3600.0 and seen.left_s is None


def test_it_runs(tmp_path: Path) -> None:
    seen = see(
        tmp_path, {"812": queued("RUNNING")}, job={}, attempts=[attempt(), running(number=1)], steps=20
    )
    assert (seen.state, seen.step, seen.num_steps, len(seen.attempts)) == ("running", 20, 24, 2)
    assert seen.waits is None and seen.why == "the time limit; requeue 1 of 2"
    # 1.5 s, and 5 s of evaluation every 10 steps
    assert seen.step_s == pytest.approx(2.0) and seen.left_s == pytest.approx(8.0)
    assert seen.queue_wait_s == 240.0
    # 30 s of steps in ten minutes, and 22:00 until 60:00
    assert seen.goodput_frac == pytest.approx(30 / (600 + 38 * 60))


def test_it_waits_after_a_requeue(tmp_path: Path) -> None:
    seen = see(tmp_path, {"812": queued(reason="BeginTime")}, job={}, attempts=[attempt()], steps=10)
    assert (seen.state, seen.waits) == ("requeued, waiting", "BeginTime")
    assert seen.queue_wait_s == 120 + 48 * 60  # since the end of the attempt at 00:12


def test_an_attempt_that_never_said_when_it_ended_did_so_before_the_next(tmp_path: Path) -> None:
    lost = attempt(ended=None, next="lost")  # began at 00:02; the next from 00:22 to 00:32
    seen = see(tmp_path, {}, job={}, attempts=[lost, attempt(number=1, next="stopped")], steps=20)
    assert seen.goodput_frac == pytest.approx(30 / (20 * 60 + 600))


def test_a_chain_waits_for_its_next_job(tmp_path: Path) -> None:
    first = attempt(next="chained")
    seen = see(tmp_path, {"814": queued(), "813": queued()}, job={"chain": [813, 814]}, attempts=[first])
    assert (seen.state, seen.job) == ("requeued, waiting", "813")


def test_an_array_s_element_has_the_comparison_s_name(tmp_path: Path) -> None:
    element = running(task=3)
    queue = {"812_3": queued("RUNNING", name="dense_vs_mot")}
    seen = see(tmp_path / "dense_vs_mot", queue, job={"task": 3}, attempts=[element])
    assert (seen.state, seen.job) == ("running", "812_3")


def test_another_s_job_with_the_same_id_is_not_ours(tmp_path: Path, slurm_says: list[Any]) -> None:
    slurm_says.append(None)
    seen = see(tmp_path, {"812": queued("RUNNING", name="theirs")}, job={})
    assert seen.state == "left the queue"


@pytest.mark.parametrize(("end", "state"), [("done", "done"), ("stopped", "stopped"), ("ended", "cancelled")])
def test_the_job_said_final_state(tmp_path: Path, end: str, state: str) -> None:
    seen = see(tmp_path, {}, job={}, attempts=[attempt(next=end, reason="so it was")], steps=10)
    assert (seen.state, seen.why) == (state, "so it was") and seen.state not in LIVE


def test_the_record_says_done_while_the_job_still_ends(tmp_path: Path) -> None:
    seen = see(
        tmp_path, {"812": queued("COMPLETING")}, job={}, attempts=[running()], record={"status": "done"}
    )
    assert seen.state == "done" and seen.left_s is None


@pytest.mark.parametrize(
    ("word", "attempts", "state", "why"),
    [
        (
            "CANCELLED by 0",
            [],
            "cancelled",
            "Slurm says CANCELLED by 0 before it started; the job left no record",
        ),
        ("NODE_FAIL", [running()], "stopped", "Slurm says NODE_FAIL; the job left no record"),
        (None, [running()], "left the queue", "the job left the queue without a record"),
        ("CANCELLED", [attempt()], "cancelled", "Slurm says CANCELLED; the job left no record"),
    ],
)
def test_it_left_the_queue_without_a_word(
    tmp_path: Path, slurm_says: list[Any], word: str | None, attempts: Any, state: str, why: str
) -> None:
    slurm_says.append(word)
    seen = see(tmp_path, {}, job={}, attempts=attempts)
    assert seen.state == state and (seen.why or "").startswith(why)


@pytest.mark.parametrize(
    ("attempts", "state"),
    [
        ([], "queued"),
        ([running()], "running"),
        ([attempt()], "requeued, waiting"),
        ([attempt(next="stopped")], "stopped"),
    ],
)
def test_where_slurm_cannot_be_asked_the_records_tell(tmp_path: Path, attempts: Any, state: str) -> None:
    assert see(tmp_path, None, job={}, attempts=attempts).state == state


def test_an_element_that_never_began(tmp_path: Path, slurm_says: list[Any]) -> None:
    slurm_says += [None, "CANCELLED", None, "COMPLETED"]
    config = write_run(tmp_path, job={"task": 3})
    run = RunTarget(config.run_dir, config)
    assert [read_state(run, {}, now=NOW).state for _ in range(2)] == ["cancelled", "left the queue"]


def own(**changes: Any) -> dict[str, Any]:
    """record.json's row of an attempt."""
    row = {
        "started": at(30),
        "stopped": None,
        "from_step": 0,
        "to_step": None,
        "exit_code": None,
        "reason": None,
    }
    return row | {"host": "here", "command": ["motley", "train", "tiny.toml"]} | changes


def test_without_slurm(tmp_path: Path) -> None:
    assert see(tmp_path / "a", {}).state == "never submitted"
    stopped = {
        "attempts": [own(stopped=at(40), to_step=10, exit_code=85, reason="SIGTERM")],
        "status": "stopped",
    }
    seen = see(tmp_path / "b", {}, record=stopped, steps=10)
    assert (seen.state, seen.why, seen.job) == ("stopped", "SIGTERM", None)
    assert seen.goodput_frac == pytest.approx(15 / 600) and seen.queue_wait_s == 0


def test_training_without_slurm_until_its_process_is_gone(tmp_path: Path) -> None:
    config = write_run(tmp_path, record={"attempts": [own()], "status": "running"})
    run, lock = RunTarget(config.run_dir, config), config.run_dir / "lock"
    for holder, expected in (
        (f"pid {os.getpid()} on {socket.gethostname()} since", "training without Slurm"),
        ("pid 1 on another-machine since", "training without Slurm"),
        (f"pid 99999999 on {socket.gethostname()} since", "stopped"),
        ("", "stopped"),
    ):
        lock.write_text(holder)
        assert read_state(run, {}, now=NOW).state == expected, holder
    assert read_state(run, {}, now=NOW).why == "killed: no stop was recorded"


def test_what_a_job_s_ranks_record_is_the_job_s(tmp_path: Path) -> None:
    mine = own(started=at(3), command=["motley", "train", "/runs/tiny/slurm/1/config.json"])
    record = {"attempts": [mine, own(stopped=at(40), exit_code=0)], "status": "stopped"}
    seen = see(tmp_path, {}, job={}, attempts=[attempt(next="stopped")], record=record)
    assert [(each["job"], each["nodes"]) for each in seen.attempts] == [(812, "node[1-2]"), (None, "here")]


def test_a_run_whose_last_checkpoint_is_gone_is_not_done(tmp_path: Path) -> None:
    record = {"attempts": [own(stopped=at(40), to_step=24, exit_code=0)], "status": "done"}
    config = write_run(tmp_path, record=record, steps=24)
    run = RunTarget(config.run_dir, config)
    assert read_state(run, {}, now=NOW).state == "done"  # nothing is left that could go on
    (config.run_dir / "checkpoints/step_00000020").mkdir(parents=True)
    seen = read_state(run, {}, now=NOW)
    assert (seen.state, seen.why) == (
        "stopped",
        "the checkpoint of step 24 is gone; the newest is of step 20",
    )


def test_half_written_files(tmp_path: Path, slurm_says: list[Any]) -> None:
    slurm_says += [None, None]
    config = write_run(tmp_path, job={}, attempts=[attempt()], steps=10)
    for name in ("record.json", "metrics.jsonl", "slurm/attempts.jsonl"):
        with (config.run_dir / name).open("a") as file:
            file.write('{"job": 812, "st')
    seen = read_state(RunTarget(config.run_dir, None), {}, now=NOW)
    assert (seen.step, len(seen.attempts), seen.num_steps, seen.left_s) == (10, 1, None, None)
    (config.run_dir / "slurm" / "1" / "job.json").write_text('{"jo')
    (config.run_dir / "slurm" / "attempts.jsonl").write_text("[1]\n{}\n")
    assert job_names(config.run_dir) == []
    assert read_state(RunTarget(config.run_dir, None), {}, now=NOW).state == "record.json is damaged"
