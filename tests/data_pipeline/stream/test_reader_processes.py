import contextlib
import itertools
import multiprocessing
import signal
import subprocess
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils.data import Dataset

from data_pipeline.shards.faults import ReaderDied
from data_pipeline.stream.reader_processes import explained_deaths, start_readers, stop_readers

ANSWER_INTS = 100_000  # more bytes than a pipe holds


class _Pages(Dataset[np.ndarray]):
    """Request n -> an array of n; a request below zero is a bug."""

    def __getitem__(self, request: int) -> np.ndarray:
        if request < 0:
            raise RuntimeError("a bug of ours")
        return np.full(ANSWER_INTS, request)


def children() -> set[BaseProcess]:
    return set(multiprocessing.active_children())


@contextlib.contextmanager
def readers(
    num_workers: int = 1, prefetch: int = 2, first: int = 0
) -> Iterator[tuple[Iterator[Any], list[BaseProcess]]]:
    """(answers, worker processes)"""
    before = children()
    results = start_readers(_Pages(), itertools.count(first), num_workers, prefetch)
    workers = list(children() - before)
    try:
        yield results, workers
    finally:
        stop_readers(results)
    assert not children() & set(workers), "stopped, and still there"


@pytest.mark.parametrize(("num_workers", "prefetch"), [(1, 1), (1, 4), (2, 3)])
def test_answers_come_in_the_order_of_the_requests_as_they_were_made(num_workers: int, prefetch: int) -> None:
    with readers(num_workers, prefetch) as (results, workers):
        assert len(workers) == num_workers
        for i in range(12):
            answer = next(results)
            assert isinstance(answer, np.ndarray) and len(answer) == ANSWER_INTS and (answer == i).all()


def test_requests_are_taken_no_further_ahead_than_asked() -> None:
    taken: list[int] = []

    def requests() -> Iterator[int]:
        for i in itertools.count():
            taken.append(i)
            yield i

    results = start_readers(_Pages(), requests(), 2, 3)
    for _ in range(5):
        next(results)
    stop_readers(results)
    assert 5 <= len(taken) <= 5 + 2 * 3


def test_random_numbers_of_the_caller_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with readers() as (results, _):
        next(results)
    assert torch.equal(torch.rand(3), expected)


def test_a_bug_in_a_worker_is_shown_as_it_is() -> None:
    with (
        readers(first=-1) as (results, _),
        pytest.raises(RuntimeError, match="a bug of ours") as caught,
        explained_deaths(),
    ):
        next(results)
    assert not isinstance(caught.value, ReaderDied)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_to_the_whole_job_does_not_take_the_workers_away(number: signal.Signals) -> None:
    with readers(prefetch=1) as (results, (worker,)):
        next(results)
        # from another process, as a cluster sends it
        subprocess.run(["kill", f"-{int(number)}", str(worker.pid)], check=True)
        for i in range(1, 6):
            assert next(results)[0] == i
        assert worker.is_alive()


def test_a_worker_ends_when_its_parent_tells_it_to() -> None:
    with readers() as (results, (worker,)):
        next(results)
        worker.terminate()
        worker.join(30)
        assert worker.exitcode == 0


@pytest.mark.parametrize("between_answers", [False, True])
def test_a_killed_worker_is_an_error_that_says_so(between_answers: bool) -> None:
    """Wherever the main thread is just then: waiting for data, or training."""
    with readers() as (results, (worker,)):
        next(results)
        with pytest.raises(ReaderDied, match=r"has died \(.*want of memory"), explained_deaths():
            worker.kill()
            if between_answers:
                time.sleep(60)  # ends at once: the signal of a child's death raises here
            while True:
                next(results)


def _read_and_wait(pids: "multiprocessing.SimpleQueue[int]") -> None:
    with readers(num_workers=2, prefetch=4) as (results, workers):
        next(results)
        for worker in workers:
            assert worker.pid is not None
            pids.put(worker.pid)
        time.sleep(600)


def test_workers_end_with_a_parent_that_is_killed_even_with_answers_in_their_hands() -> None:
    context = multiprocessing.get_context("fork")
    pids = context.SimpleQueue()
    parent = context.Process(target=_read_and_wait, args=(pids,))
    parent.start()
    found = [pids.get(), pids.get()]
    parent.kill()
    parent.join(30)
    deadline = time.monotonic() + 60
    while any(psutil.pid_exists(pid) for pid in found):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.05)


_forgotten: list[Iterator[Any]] = []


def _read_and_return() -> None:
    _forgotten.append(start_readers(_Pages(), itertools.count(), 1, 4))
    next(_forgotten[0])


def test_a_process_that_forgets_to_stop_its_workers_still_ends() -> None:
    parent = multiprocessing.get_context("fork").Process(target=_read_and_return)
    parent.start()
    parent.join(60)
    assert parent.exitcode == 0
