"""Running a function on several real gloo ranks, for tests.

Ranks are forked from a warm process that has imported everything: a fresh interpreter spends seconds on
imports, a forked one starts in milliseconds. The warm process is a child of the test runner, whose own
threads would not survive a fork. It starts at the first use, lives as long as the test runner and serves one
case at a time.
"""

import atexit
import contextlib
import faulthandler
import importlib
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
_IMPORTED_BY_ENGINES = (
    "torch._inductor.compile_fx",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
)
"""What DeepSpeed 0.19 imports where it makes an engine: 1.3 s in every rank that finds none of them. Another
version may lack a name, and its ranks then only start later."""
_warm: "subprocess.Popen[bytes] | None" = None


class RanksFailed(RuntimeError):
    """A rank raised, died or did not end in time. `rank` is the first one; its traceback is the message."""

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

    `fn` is a function at module level; `args` and results are picklable. A rank has the environment of
    parallel/launch.py, so `world.start(ParallelConfig())` works in it. Raises RanksFailed with the traceback
    and output of the first rank that failed. Ranks that do not end within `timeout_s` are killed, and the
    error shows where they were.
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
    """Send a request to the warm process, which is started if need be; returns its answer."""
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
    warm.stdin.close()  # the end of requests makes it leave
    try:
        warm.wait(10)
    except subprocess.TimeoutExpired:
        warm.kill()


def _read(stream: IO[bytes]) -> bytes | None:
    """The next message of a stream; None at its end."""
    header = stream.read(_HEADER.size)
    return stream.read(_HEADER.unpack(header)[0]) if len(header) == _HEADER.size else None


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """The warm process: answer requests until there are no more."""
    from parallel import world

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # ranks use gloo, and a forked process could not use CUDA
    world.import_libraries()
    import torch

    for module in _IMPORTED_BY_ENGINES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    torch.set_num_threads(1)
    _first_step(torch)
    while (request := _read(requests)) is not None:
        answer = pickle.dumps(_run_case(pickle.loads(request)))
        answers.write(_HEADER.pack(len(answer)) + answer)
        answers.flush()


def _first_step(torch: ModuleType) -> None:
    """Do an optimizer step, because the first one of a process imports more modules (0.5 s)."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.sum().backward()
    torch.optim.AdamW([parameter], fused=True).step()


def _run_case(case: _Case) -> tuple[str, Any, int | None]:
    """("ok", pickled results, None) or ("failed", message, rank)."""
    try:
        # What the function and its arguments need is imported before the fork, once and not by every rank.
        _load(case)
        pickle.loads(case.arguments)
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
    """Fork a rank, which runs the function, sends its pickled result and waits to be killed."""
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
            # The rank waits to be killed, since leaving early would reset the connections of its peers.
            signal.pause()
    finally:
        os._exit(0)  # a rank must not run the exit handlers of the warm process


def _load(case: _Case) -> ModuleType:
    """The test's module, under the name that it has in the test runner, so that its classes unpickle."""
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
    """Read the answers of all ranks.

    If a rank failed, its peers get a moment to fail too, and the first failure is reported: a dead rank, else
    the earliest exception. The peers only lost their connection.
    """
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
        os.kill(ranks[number].pid, signal.SIGABRT)  # faulthandler then prints where it was
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
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # only the test runner ends this process
    _serve(sys.stdin.buffer, answers)
