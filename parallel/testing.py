"""Run a function on several real gloo ranks, for tests: forked from a process that has imported everything.

A rank of a fresh interpreter spends seconds on imports; a forked one starts in milliseconds. The warm process
is a child of its own rather than the test runner, whose threads would not survive a fork. It starts at the
first use, lives as long as the test runner and serves one case at a time.
"""

import atexit
import contextlib
import faulthandler
import importlib.util
import inspect
import os
import pickle
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO

from parallel import launch

_HEADER = struct.Struct("<Q")
_warm: "subprocess.Popen[bytes] | None" = None


class RanksFailed(RuntimeError):
    """A rank raised, died or did not end in time. `rank` is the first that did, its traceback the message."""

    def __init__(self, message: str, rank: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class _Case:
    file: str
    module: str
    function: str
    arguments: bytes
    world_size: int
    timeout_s: float


@dataclass
class _Rank:
    pid: int
    pipe: int
    output: BinaryIO
    answer: bytes = b""


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60.0) -> list[Any]:
    """Call `fn(*args)` on `world_size` forked ranks and return what each returned, in rank order.

    `fn` is a function at module level, `args` and results are picklable. A rank finds the environment of our
    own launcher, so `world.start(ParallelConfig())` works in it. Raises RanksFailed with the first failing
    rank's traceback and output; ranks that have not ended after `timeout_s` are killed, and the place where
    they were is shown.
    """
    file = inspect.getsourcefile(fn)
    if file is None or "<" in fn.__qualname__:
        raise ValueError(
            f"{fn.__qualname__} must be a function at the top level of a module: ranks import it"
        )
    module = fn.__module__ if fn.__module__ != "__main__" else Path(file).stem
    case = _Case(file, module, fn.__qualname__, pickle.dumps(args), world_size, timeout_s)
    status, payload, rank = _ask(pickle.dumps(case), timeout_s + 60)
    if status == "failed":
        raise RanksFailed(payload, rank)
    return [pickle.loads(result) for result in payload]


def _ask(request: bytes, timeout_s: float) -> tuple[str, Any, int | None]:
    global _warm
    if _warm is None or _warm.poll() is not None:
        _warm = subprocess.Popen(
            [sys.executable, "-m", "parallel.testing", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[1],
            env=launch.child_environment(2, threads=1),
        )
        atexit.register(_end, _warm)
    assert _warm.stdin is not None and _warm.stdout is not None
    _warm.stdin.write(_HEADER.pack(len(request)) + request)
    _warm.stdin.flush()
    with selectors.DefaultSelector() as selector:
        selector.register(_warm.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            _warm.kill()
            raise RanksFailed(f"the process that forks ranks did not answer within {timeout_s:.0f} s")
    answer = _read(_warm.stdout)
    if answer is None:
        raise RanksFailed(f"the process that forks ranks died with code {_warm.wait()}")
    return pickle.loads(answer)


def _end(warm: "subprocess.Popen[bytes]") -> None:
    assert warm.stdin is not None
    warm.stdin.close()  # no more requests: it leaves
    try:
        warm.wait(10)
    except subprocess.TimeoutExpired:
        warm.kill()


def _read(stream: IO[bytes]) -> bytes | None:
    header = stream.read(_HEADER.size)
    return stream.read(_HEADER.unpack(header)[0]) if len(header) == _HEADER.size else None


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    from parallel import world

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo ranks; a forked process could not use CUDA in any case
    world.import_libraries()
    import torch

    torch.set_num_threads(1)
    _first_step(torch)
    while (request := _read(requests)) is not None:
        answer = pickle.dumps(_run_case(pickle.loads(request)))
        answers.write(_HEADER.pack(len(answer)) + answer)
        answers.flush()


def _first_step(torch: ModuleType) -> None:
    """The first optimizer step of a process imports more (0.5 s): do that once, here."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.sum().backward()
    torch.optim.AdamW([parameter], fused=True).step()


def _run_case(case: _Case) -> tuple[str, Any, int | None]:
    try:
        _load(case)  # before the fork: what a test module imports is then imported once, not by every rank
    except Exception:
        return "failed", f"{case.file} cannot be imported: {traceback.format_exc()}", None
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(launch.open_store_socket())
        ranks = [
            _fork(case, rank, store, stack.enter_context(tempfile.TemporaryFile()))
            for rank in range(case.world_size)
        ]
        store.close()
        try:
            return _collect(case, ranks)
        finally:
            for rank in ranks:
                os.close(rank.pipe)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank.pid, signal.SIGKILL)
                os.waitpid(rank.pid, 0)


def _fork(case: _Case, rank: int, store: Any, output: BinaryIO) -> _Rank:
    read_end, write_end = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(write_end)
        return _Rank(pid, read_end, output)
    try:
        launch.die_with_parent(parent)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        faulthandler.enable()
        os.environ.update(launch.rank_environment(rank, case.world_size, store))
        try:
            function = getattr(_load(case), case.function)
            answer = pickle.dumps(function(*pickle.loads(case.arguments)))
        except BaseException:
            answer = (time.monotonic(), traceback.format_exc())
        sys.stdout.flush()
        sys.stderr.flush()
        with open(write_end, "wb") as pipe:
            pipe.write(pickle.dumps(answer))
        if isinstance(answer, bytes):
            # Leave when all are done: a rank that goes early resets its peers' connections.
            signal.pause()
    finally:
        os._exit(0)  # the warm process's exit handlers are not ours


def _load(case: _Case) -> ModuleType:
    """The test's module under the name it has in the test runner, so that its classes unpickle."""
    if case.module in sys.modules:
        return sys.modules[case.module]
    with contextlib.suppress(ImportError):
        module = importlib.import_module(case.module)
        if Path(module.__file__ or "") == Path(case.file):
            return module
    spec = importlib.util.spec_from_file_location(case.module, case.file)
    assert spec is not None and spec.loader is not None, case
    module = sys.modules[case.module] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _collect(case: _Case, ranks: list[_Rank]) -> tuple[str, Any, int | None]:
    """Read every rank's answer. Where one failed, give its peers a moment and report who was first: a dead
    rank, else the earliest exception; the others only lost their connection to it."""
    results: dict[int, bytes] = {}
    failures: list[tuple[float, int, str]] = []
    deadline = time.monotonic() + case.timeout_s
    with selectors.DefaultSelector() as selector:
        for number, rank in enumerate(ranks):
            selector.register(rank.pipe, selectors.EVENT_READ, number)
        while len(results) + len(failures) < len(ranks):
            events = selector.select(max(0.0, deadline - time.monotonic()))
            if not events:
                break
            for key, _ in events:
                rank = ranks[key.data]
                if chunk := os.read(rank.pipe, 1 << 20):
                    rank.answer += chunk
                    continue
                selector.unregister(rank.pipe)
                answer = pickle.loads(rank.answer) if rank.answer else (0.0, "died without an answer")
                if isinstance(answer, bytes):
                    results[key.data] = answer
                else:
                    failures.append((answer[0], key.data, answer[1]))
                    deadline = min(deadline, time.monotonic() + 0.5)
    if failures:
        _, number, message = min(failures)
        where = f"rank {number} of {case.world_size}, {case.module}.{case.function}"
        return "failed", f"{where}: {message}{_tail(ranks[number].output)}", number
    if len(results) < len(ranks):
        return "failed", _describe_timeout(case, ranks, results), None
    return "ok", [results[number] for number in range(len(ranks))], None


def _describe_timeout(case: _Case, ranks: list[_Rank], results: dict[int, bytes]) -> str:
    late = [number for number in range(len(ranks)) if number not in results]
    for number in late:
        os.kill(ranks[number].pid, signal.SIGABRT)  # faulthandler writes where it is
    time.sleep(0.5)
    where = "".join(f"\nrank {number}:{_tail(ranks[number].output)}" for number in late)
    return f"ranks {late} of {case.world_size} did not end within {case.timeout_s:.0f} s{where}"


def _tail(output: BinaryIO, limit: int = 6_000) -> str:
    output.seek(0, os.SEEK_END)
    output.seek(max(0, output.tell() - limit))
    text = output.read().decode(errors="replace").strip()
    return f"\n--- its output ---\n{text}" if text else ""


if __name__ == "__main__":
    launch.die_with_parent(int(sys.argv[1]))
    # Requests come on stdin and answers go to stdout; what libraries print goes to stderr.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the test runner decides
    _serve(sys.stdin.buffer, answers)
