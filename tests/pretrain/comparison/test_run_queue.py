"""Real processes: a few at a time, failures named, signals passed on."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.run_queue import (
    Outcome,
    RunCommand,
    failure,
    lock_comparison,
    run_commands,
)
from pretrain.newest_rows import last_row


def job(tmp_path: Path, name: str, code: str, num_steps: int = 2) -> RunCommand:
    """A Python program that finds its metrics file in `metrics`."""
    metrics = tmp_path / name / "metrics.jsonl"
    prelude = f"""
        import json, pathlib, signal, sys, time
        metrics = pathlib.Path({str(metrics)!r})
        metrics.parent.mkdir(exist_ok=True)
        def write(step):
            with metrics.open("a") as file: file.write(json.dumps({{"step": step, "train/loss": 3.5}}) +
            "\\n")
        """
    program = textwrap.dedent(prelude) + textwrap.dedent(code)
    return RunCommand(
        name=name,
        argv=(sys.executable, "-c", program),
        env=dict(os.environ),
        log=tmp_path / name / "logs" / "compare.log",
        metrics=metrics,
        num_steps=num_steps,
    )


def test_one_that_fails_is_named_with_its_last_words_and_the_others_go_on(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "bad", "write(1); print('loading'); sys.exit('no such shard: tokens-00003.tar')"),
        job(tmp_path, "good", "write(1); write(2)"),
        job(tmp_path, "killed", "import os; os.kill(os.getpid(), signal.SIGKILL)"),
    ]
    out = io.StringIO()
    bad, good, killed = run_commands(jobs, concurrent_runs=1, out=out)
    assert (bad.exit_code, good.exit_code, killed.exit_code) == (1, 0, -signal.SIGKILL)
    assert good.done and not bad.done and not bad.stopped and not killed.stopped
    assert (
        "bad failed:\nexit code 1" in out.getvalue() and "no such shard: tokens-00003.tar" in out.getvalue()
    )
    assert "killed by SIGKILL" in out.getvalue()
    assert "good: 2/2 step, loss 3.5" in out.getvalue()


def test_never_more_than_asked_for_at_a_time(tmp_path: Path) -> None:
    code = f"""
        here = pathlib.Path({str(tmp_path)!r})
        me = here / f"running-{{metrics.parent.name}}"
        me.touch()
        def alone(): return len(list(here.glob("running-*"))) < 2
        def last(): return len(list(here.glob("seen-*"))) == 3
        until = time.monotonic() + 60  # wait for a neighbour, so that there is one to count
        while alone() and not last() and time.monotonic() < until: time.sleep(0.05)
        time.sleep(0.2)
        (here / f"seen-{{metrics.parent.name}}").write_text(str(len(list(here.glob("running-*")))))
        me.unlink()
    """
    outcomes = run_commands(
        [job(tmp_path, f"run{i}", code) for i in range(4)], concurrent_runs=2, out=io.StringIO()
    )
    assert all(outcome.done for outcome in outcomes)
    seen = [int(path.read_text()) for path in tmp_path.glob("seen-*")]
    assert len(seen) == 4 and max(seen) == 2


WAITS = """
    def stop(*_):
        write(2); sys.exit(85)
    signal.signal(signal.SIGTERM, stop)
    write(1)
    time.sleep(60)
"""


@pytest.fixture
def heard() -> Iterator[None]:
    """A suite that was started in the background of a shell has SIGINT ignored, which a queue leaves so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_makes_runs_save_and_starts_no_other(
    tmp_path: Path, number: signal.Signals, heard: None
) -> None:
    before = signal.getsignal(number)
    jobs = [job(tmp_path, "first", WAITS), job(tmp_path, "second", WAITS)]
    send_once(lambda: last_row(jobs[0].metrics) != {}, number)
    out = io.StringIO()
    first, second = run_commands(jobs, concurrent_runs=1, out=out)
    assert first.exit_code == 85 and first.stopped
    assert second.exit_code is None and second.stopped
    assert last_row(jobs[0].metrics)["step"] == 2
    assert f"{number.name}: the runs save and stop" in out.getvalue()
    assert signal.getsignal(number) == before


def test_a_second_signal_kills_a_run_that_does_not_listen(tmp_path: Path) -> None:
    deaf = job(tmp_path, "deaf", "signal.signal(signal.SIGTERM, signal.SIG_IGN); write(1); time.sleep(60)")
    send_once(lambda: last_row(deaf.metrics) != {}, signal.SIGTERM, again_after_s=1.0)
    (outcome,) = run_commands([deaf], concurrent_runs=1, out=io.StringIO())
    assert outcome.exit_code == -signal.SIGKILL and outcome.stopped


def send_once(ready: object, number: int, again_after_s: float | None = None) -> None:
    def send() -> None:
        deadline = time.monotonic() + 30
        while not ready() and time.monotonic() < deadline:  # type: ignore[operator]
            time.sleep(0.05)
        os.kill(os.getpid(), number)
        if again_after_s is not None:
            time.sleep(again_after_s)
            os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()


def test_runs_do_not_outlive_a_comparison_that_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    write_pid = f"pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid()))"
    child = f"import os, pathlib, time; {write_pid}; time.sleep(60)"
    program = f"""
import os, pathlib, sys
from pretrain.comparison.run_queue import RunCommand, run_commands
here = pathlib.Path({str(tmp_path)!r})
child = (sys.executable, "-c", {child!r})
run_commands([RunCommand("run", child, dict(os.environ), here / "log", here / "metrics", 1)],
         concurrent_runs=1, out=sys.stderr)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pid = int(pid_file.read_text())
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_directory_is_held_by_one_process(tmp_path: Path) -> None:
    with (
        lock_comparison(tmp_path),
        pytest.raises(ConfigError, match=f"pid {os.getpid()}"),
        lock_comparison(tmp_path),
    ):
        pass
    with lock_comparison(tmp_path):  # and let go of
        pass


def test_a_failure_without_a_log_is_still_told(tmp_path: Path) -> None:
    assert "exit code 3" in failure(Outcome("run", 3, tmp_path / "none.log"))
