"""One process holds a directory until it ends, well or killed. Other holders are real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from data_pipeline.files.lock import LOCK, lock_directory
from data_pipeline.files.toml_config import ConfigError

HOLD = """
import os, sys, time
from pathlib import Path
from data_pipeline.files.lock import lock_directory
with lock_directory(Path(sys.argv[1]), str, shared=sys.argv[2] == "shared"):
    if sys.argv[2] == "fork" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(600)
    if sys.argv[2] != "fork":
        print("held", flush=True)
    time.sleep(600)
"""


@contextmanager
def holder(directory: Path, kind: str) -> Iterator[tuple[int, str]]:
    """Another process that holds the directory until the block ends: its id, and the line that it printed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), kind], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process.pid, process.stdout.readline()
    finally:
        process.kill()
        process.wait()


def refusal(directory: Path, *, shared: bool = False) -> str:
    with (
        pytest.raises(ConfigError) as error,
        lock_directory(directory, lambda holder: f"{holder} has it", shared=shared),
    ):
        pass
    return str(error.value)


def test_another_process_is_refused_by_name_until_the_holder_is_killed(tmp_path: Path) -> None:
    directory = tmp_path / "deep" / "down"
    with holder(directory, "exclusive") as (pid, _):
        for shared in (False, True):
            message = refusal(directory, shared=shared)
            assert message.startswith(f"pid {pid} on ") and message.endswith(" has it")
    assert f"pid {pid}" in (directory / LOCK).read_text()  # left behind by the killed process
    with lock_directory(directory, str):
        assert f"pid {os.getpid()} on " in (directory / LOCK).read_text()
    assert (directory / LOCK).read_text() == ""


def test_a_second_block_of_this_process_is_refused_and_does_not_free_the_lock(tmp_path: Path) -> None:
    with lock_directory(tmp_path, str):
        assert refusal(tmp_path).startswith(f"pid {os.getpid()} on ")
        assert refusal(tmp_path / ".." / tmp_path.name).startswith(f"pid {os.getpid()} on ")
        other = subprocess.run(
            [sys.executable, "-c", HOLD, str(tmp_path), "exclusive"], capture_output=True, text=True
        )
        assert f"LockHeld: pid {os.getpid()} on " in other.stderr
    with lock_directory(tmp_path, str):
        pass


def test_a_block_that_fails_frees_the_lock(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), lock_directory(tmp_path, str):
        raise RuntimeError
    with lock_directory(tmp_path, str):
        pass


def test_shared_holders_exclude_exclusive_ones_only(tmp_path: Path) -> None:
    with holder(tmp_path, "shared"):
        with lock_directory(tmp_path, str, shared=True):
            pass
        assert refusal(tmp_path) == "another process has it"


def test_a_forked_worker_does_not_keep_the_lock_of_a_killed_process(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as (_, worker):
        assert "pid" in refusal(tmp_path)
    try:
        with lock_directory(tmp_path, str):
            os.kill(int(worker), 0)  # the worker is alive
    finally:
        os.kill(int(worker), signal.SIGKILL)
