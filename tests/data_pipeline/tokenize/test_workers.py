import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.workers import default_processes, run_tasks


def square(x: int) -> int:
    return x * x


def process_of(_: int) -> tuple[int, int]:
    np.eye(2) @ np.eye(2)
    return os.getpid(), max(pool["num_threads"] for pool in threadpool_info())


def fail_at_three(x: int) -> int:
    if x == 3:
        raise ConfigError("three is too many")
    return x


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def report_and_sleep(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def results(function: Callable[[Any], Any], tasks: Sequence[Any], **options: Any) -> list[Any]:
    with run_tasks(function, tasks, 2, **options) as found:
        return list(found)


def test_every_task_gives_its_result_once() -> None:
    assert sorted(results(square, range(9))) == [x * x for x in range(9)]
    assert results(square, []) == []
    assert default_processes() >= 1


def test_fresh_processes_on_one_thread_each() -> None:
    seen = results(process_of, range(4), preload=("numpy",), fresh_process_per_task=True)
    assert len({pid for pid, _ in seen}) == 4
    assert {threads for _, threads in seen} == {1}


def test_an_error_of_a_task_is_raised_here() -> None:
    with pytest.raises(ConfigError, match="three is too many"):
        results(fail_at_three, range(9))


def sleep_then_touch(path: Path) -> None:
    time.sleep(0.2)
    path.touch()


def test_tasks_that_wait_are_dropped_when_the_block_is_left(tmp_path: Path) -> None:
    paths = [tmp_path / str(i) for i in range(200)]
    with pytest.raises(RuntimeError, match="enough"), run_tasks(sleep_then_touch, paths, 1) as found:
        next(iter(found))
        raise RuntimeError("enough")
    assert 1 <= len(list(tmp_path.iterdir())) < 100


def test_a_killed_worker_is_said() -> None:
    with pytest.raises(ConfigError, match="a worker process was killed"):
        results(die, range(2))


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from tests.data_pipeline.tokenize.test_workers import report_and_sleep, results\n"
        "if __name__ == '__main__':\n"
        f"    results(report_and_sleep, [Path({str(tmp_path)!r})] * 2)\n"
    )
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
