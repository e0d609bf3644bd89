"""Runs independent tasks in processes: results come as tasks finish, and no worker outlives its parent."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

from data_pipeline.files.printable import escape_output
from data_pipeline.files.toml_config import ConfigError

Task = TypeVar("Task")
Result = TypeVar("Result")


def default_processes() -> int:
    """Number of cores that this process may use: a container's or Slurm's share, not the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def run_tasks(
    function: Callable[[Task], Result],
    tasks: Sequence[Task],
    processes: int,
    *,
    preload: Sequence[str] = (),
    fresh_process_per_task: bool = False,
) -> Iterator[Iterator[Result]]:
    """`with run_tasks(f, tasks, 2) as results:` gives f(task) of every task, in order of completion.

    Workers are forked from a server process that has imported `preload`, so starting a worker is cheap and a
    fresh worker carries no state of an earlier task. A worker runs its numerics on one thread. The first
    error of a task is raised here. When the block is left, running tasks end and waiting tasks are dropped.
    """
    if processes < 1:
        raise ConfigError(f"--processes {processes}: at least 1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, *preload])
    pool = ProcessPoolExecutor(
        max_workers=max(1, min(processes, len(tasks))),
        mp_context=context,
        initializer=_start_worker,
        max_tasks_per_child=1 if fresh_process_per_task else None,
    )
    try:
        futures = [pool.submit(function, task) for task in tasks]
        yield (future.result() for future in as_completed(futures))
    except BrokenProcessPool:
        raise ConfigError(
            "a worker process was killed, most often for want of memory: take fewer --processes and run this "
            "again; finished work is kept"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    """Set a worker up: one thread, no Ctrl-C, escaped output, and an end when the parent ends."""
    escape_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which shuts the pool down
    threadpool_limits(1)
    parent = multiprocessing.parent_process()
    assert parent is not None, "a pool worker has a parent"

    def follow_parent() -> None:
        parent.join()  # a killed parent sends its workers nothing: without this they would wait for ever
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
