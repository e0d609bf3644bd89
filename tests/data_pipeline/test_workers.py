import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from threadpoolctl import threadpool_info

from data_pipeline.toml_config import ConfigError
from data_pipeline.workers import default_processes, run_tasks


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


def test_every_task_gives_its_result_once() -> None:
    assert sorted(run_tasks(square, range(9), 2)) == [x * x for x in range(9)]
    assert list(run_tasks(square, [], 2)) == []
    assert default_processes() >= 1


def test_fresh_processes_on_one_thread_each() -> None:
    seen = list(run_tasks(process_of, range(4), 2, preload=("numpy",), fresh_process_per_task=True))
    assert len({pid for pid, _ in seen}) == 4
    assert {threads for _, threads in seen} == {1}


def test_an_error_of_a_task_is_raised_here() -> None:
    with pytest.raises(ConfigError, match="three is too many"):
        list(run_tasks(fail_at_three, range(9), 2))


def test_a_killed_worker_is_said() -> None:
    with pytest.raises(ConfigError, match="a worker process was killed"):
        list(run_tasks(die, range(2), 1))


def test_workers_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from data_pipeline.workers import run_tasks\n"
        "from tests.data_pipeline.test_workers import report_and_sleep\n"
        "if __name__ == '__main__':\n"
        f"    list(run_tasks(report_and_sleep, [Path({str(tmp_path)!r})] * 2, 2))\n"
    )
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=root)
    while len(list(tmp_path.iterdir())) < 2:
        assert parent.poll() is None
        time.sleep(0.05)
    workers = [psutil.Process(int(path.name)) for path in tmp_path.iterdir()]
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
