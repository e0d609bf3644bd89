"""Real ranks of one machine, started, signalled and killed; and which of them is said to have failed
first."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from parallel.rank_end import first_failure
from parallel.spawn import Ended, spawn


def _python(code: str) -> list[str]:
    return ["-c", f"import os, signal, sys, time\nrank = int(os.environ['RANK'])\n{code}"]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("assert os.environ['WORLD_SIZE'] == '3'", 0),
        ("sys.exit(85)", 85),
        ("sys.exit(85 if rank else 0)", 85),
        ("sys.exit(7 if rank == 1 else 0)", 7),
    ],
)
def test_the_exit_code_of_all_ranks(code: str, expected: int) -> None:
    assert spawn(_python(code), 3).exit_code == expected


def test_a_rank_that_fails_is_named_and_ends_the_others(capfd: pytest.CaptureFixture[str]) -> None:
    # The others would sleep for longer than a test may take.
    ended = spawn(_python("time.sleep(0.3 if rank == 1 else 3600); sys.exit(3)"), 3)
    assert (ended.exit_code, ended.rank) == (3, 1)
    assert ended.cause is not None and ended.cause.startswith("rank 1 of 3: error: exited with code 3 (pid ")
    assert capfd.readouterr().err == ""


def test_a_killed_rank_is_named_and_ranks_that_ignore_the_end_are_killed() -> None:
    code = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "time.sleep(0.5 if rank == 0 else 60)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    ended = spawn(_python(code), 2, grace_s=0.5)
    assert (ended.exit_code, ended.rank) == (128 + signal.SIGKILL, 0)
    assert ended.cause is not None and ended.cause.startswith("rank 0 of 2: killed by SIGKILL")


# Rank 0 loses rank 1, if that fails, and says so in its own record. Either may end first.
_RECORDS = """
from parallel.rank_end import EndRecord
end = EndRecord(os.environ["MOTLEY_ATTEMPT_DIR"], rank)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
failing = os.path.join(os.environ["MOTLEY_ATTEMPT_DIR"], "failing")
if rank == 1:
    open(failing, "w").close()
    {failure}
while not os.path.exists(failing):
    time.sleep(0.01)
end.close(exit_code=1, kind="lost_peer", message="Connection closed by peer", step=None)
sys.exit(1)
"""
_DATA = 'end.close(exit_code=1, kind="data", message="a.tar: damaged", step=None); sys.exit(1)'


@pytest.mark.parametrize(
    ("failure", "code", "cause"),
    [
        (_DATA, 1, "rank 1 of 2: data: a.tar: damaged"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "rank 1 of 2: killed by SIGSEGV (pid "),
        ("pass", 1, "rank"),  # no rank failed by itself
    ],
)
def test_the_rank_that_failed_is_told_from_those_that_lost_it(failure: str, code: int, cause: str) -> None:
    ended = spawn(_python(_RECORDS.format(failure=failure)), 2)
    assert ended.exit_code == code
    assert ended.cause is not None and ended.cause.startswith(cause)


def test_a_rank_that_fails_after_its_work_has_failed() -> None:
    code = (
        "from parallel.rank_end import EndRecord\n"
        "end = EndRecord(os.environ['MOTLEY_ATTEMPT_DIR'], rank)\n"
        "end.close(exit_code=0, kind='done', message='', step=3)\n"
        "sys.exit(4 * rank)"
    )
    ended = spawn(_python(code), 2)
    assert (ended.exit_code, ended.rank) == (4, 1)
    assert ended.cause is not None and ended.cause.endswith("after its work was done")


def test_a_rank_that_hangs_when_another_has_stopped_is_killed_and_named() -> None:
    why = "SIGTERM: left in its step after 5 s, without a checkpoint"
    code = (
        "from parallel.rank_end import EndRecord\n"
        "if rank == 1: os.kill(os.getpid(), signal.SIGSTOP)\n"
        "end = EndRecord(os.environ['MOTLEY_ATTEMPT_DIR'], rank)\n"
        f"end.close(exit_code=85, kind='stopped', message={why!r}, step=None)\n"
        "sys.exit(85)"
    )
    ended = spawn(_python(code), 2, grace_s=0.5)
    assert ended == Ended(85, 0, f"rank 0 of 2: {why}; killed what did not end: rank 1")


def end(rank: int, kind: str, time: float, *, code: int = 1, message: str = "m") -> dict[str, Any]:
    return {"rank": rank, "kind": kind, "time": time, "exit_code": code, "message": message}


@pytest.mark.parametrize(
    ("ends", "first"),
    [
        ([end(0, "done", 1.0), end(1, "stopped", 1.0)], None),
        ([end(0, "error", 2.0), end(1, "data", 1.0), end(2, "lost_peer", 0.0)], 1),
        # Its end is seen later than the error of the rank that lost it and does not know it.
        ([end(0, "error", 1.0), end(1, "killed", 2.0, code=137)], 1),
        # Libraries abort a rank that has lost another.
        ([end(0, "killed", 1.0, code=134), end(1, "error", 2.0)], 1),
        ([end(0, "lost_peer", 1.0), end(1, "killed", 2.0, code=134)], 1),
        ([end(0, "data", 1.0, message="rank 1: x"), end(1, "data", 2.0, message="rank 1: x")], 1),
    ],
)
def test_the_first_failure(ends: list[dict[str, Any]], first: int | None) -> None:
    found = first_failure(ends)
    assert (None if found is None else found["rank"]) == first


_HANDLER = (
    "def stop(number, frame):\n"
    "    os.write(1, f'rank {rank} got {number}\\n'.encode())\n"
    "    sys.exit(85)\n"
    "for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):\n"
    "    signal.signal(number, stop)\n"
    "os.write(1, b'ready\\n')\n"
    "time.sleep(60)"
)


def _launcher(code: str, processes: int) -> "subprocess.Popen[str]":
    command = (
        f"import sys; from parallel.spawn import spawn; ended = spawn({_python(code)!r}, {processes})\n"
        "print(ended.cause or '', file=sys.stderr); sys.exit(ended.exit_code)"
    )
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_signals_reach_every_rank(number: signal.Signals) -> None:
    launcher = _launcher(_HANDLER, 2)
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    launcher.send_signal(number)
    out, _ = launcher.communicate(timeout=60)
    assert launcher.returncode == 85
    assert sorted(out.splitlines()) == [f"rank {rank} got {int(number)}" for rank in range(2)]


def test_a_signal_before_a_rank_can_handle_it_is_a_stop_not_a_failure() -> None:
    launcher = _launcher("os.write(1, b'ready\\n')\ntime.sleep(60)", 2)
    assert launcher.stdout is not None
    assert [launcher.stdout.readline() for _ in range(2)] == ["ready\n", "ready\n"]
    launcher.send_signal(signal.SIGTERM)
    _, said = launcher.communicate(timeout=60)
    assert launcher.returncode == 85
    assert said == "a signal stopped the ranks before they could listen\n"


def test_no_rank_outlives_a_killed_launcher() -> None:
    launcher = _launcher("os.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)", 2)
    assert launcher.stdout is not None
    ranks = [int(launcher.stdout.readline()) for _ in range(2)]
    launcher.kill()
    launcher.wait()
    deadline = time.monotonic() + 30
    while any(_alive(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in ranks)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
