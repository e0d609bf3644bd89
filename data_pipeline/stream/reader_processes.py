"""The worker processes of a loader: torch's DataLoader, with an end for each way in which a job can end."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from data_pipeline.shards.faults import ReaderDied

_JOB_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PARENT_CHECK_S = 1.0
_JOIN_S = 10.0
_DEATH = "DataLoader worker (pid"
"""In torch's message about a process that has died. (That of an exception in one has "worker process".)"""


def start_readers(
    dataset: Dataset[Any], requests: Iterable[Any], num_workers: int, prefetch: int
) -> Iterator[Any]:
    """dataset[request] for each of `requests`, in their order, read ahead by `num_workers` forked processes.

    Each holds up to `prefetch` answers ready; an answer comes as one pickled message. To be ended by
    stop_readers.
    """
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=requests,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=partial(_live_and_die_with, os.getpid()),
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else it draws from the global one: a resumed run would differ
    )
    results = iter(loader)
    _explain_deaths()
    return results


def stop_readers(results: Any) -> None:
    """End the workers of a DataLoader's iterator; one that is stuck in a read is killed."""
    workers = results._workers
    results._shutdown_workers()
    deadline = time.monotonic() + _JOIN_S
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join()


def _as_it_is(result: Any) -> Any:
    """In place of torch's collate function, which makes tensors of arrays and sends each in shared memory."""
    return result


@contextlib.contextmanager
def explained_deaths() -> Iterator[None]:
    """Turns torch's error about a worker that has died into ReaderDied."""
    try:
        yield
    except RuntimeError as error:
        if _DEATH not in str(error) or isinstance(error, ReaderDied):
            raise
        raise ReaderDied(
            f"a process that reads the data has died ({str(error).strip()}). If the kernel killed it for "
            f"want of memory, lower data.num_workers or data.prefetch_steps; data.num_workers=0 reads "
            f"without such processes. The run can go on from its last checkpoint."
        ) from error


def _live_and_die_with(parent: int, _worker: int) -> None:
    """What ends a worker is its parent: by telling it to, or by ending itself, in whatever way.

    A cluster signals every process of a job: the main one decides, and still needs its workers to write a
    checkpoint. And after a kill -9 of the parent, a worker whose last message fills the pipe would wait for
    ever for a reader, holding memory and the job's output open.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _JOB_SIGNALS)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        sent = signal.sigtimedwait(_JOB_SIGNALS, _PARENT_CHECK_S)
        if sent is not None and sent.si_signo == signal.SIGTERM and sent.si_pid == parent:
            break
    os._exit(0)


def _explain_deaths() -> None:
    """Let the death of a worker, which torch raises wherever the main thread is just then, say what to do."""
    raises = signal.getsignal(signal.SIGCHLD)
    if not callable(raises) or getattr(raises, "explains_deaths", False):
        return

    def explain(number: int, frame: FrameType | None) -> None:
        with explained_deaths():
            raises(number, frame)

    explain.explains_deaths = True  # type: ignore[attr-defined]
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, explain)
