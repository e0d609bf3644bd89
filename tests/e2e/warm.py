"""Real training processes without their seconds of imports: forked from one that has imported everything.

Each rank is a process of its own in a session of its own, which a test may signal and kill.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from parallel import launch

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 90.0
_server: "subprocess.Popen[str] | None" = None


class Run:
    """`motley train ARGV` on `processes` ranks; what they print is in `output`."""

    def __init__(self, argv: Sequence[str], output: Path, *, processes: int = 1) -> None:
        self.output = output
        self.pids: list[int] = _ask(start=list(argv), output=str(output), processes=processes)

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look every half millisecond: a save of so small a model takes some tens of them."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; {self.text()}"
            assert self._alive(), f"ended too early; {self.text()}"
            time.sleep(0.0005)

    def _alive(self) -> bool:
        state = Path(f"/proc/{self.pids[0]}/stat").read_text().rpartition(")")[2].split()[0]
        return state != "Z"

    def codes(self) -> list[int]:
        """Wait for all ranks; their exit codes, negative for a signal."""
        return _ask(wait=self.pids)

    def text(self) -> str:
        return self.output.read_text()


def train(argv: Sequence[str], output: Path, *, processes: int = 1) -> None:
    """Run to the end, which must be a good one."""
    run = Run(argv, output, processes=processes)
    assert run.codes() == [0] * processes, run.text()


def _ask(**request: Any) -> Any:
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, "-m", "tests.e2e.warm", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=launch.child_environment(2, threads=1)
            | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
        )
        atexit.register(_server.kill)
    assert _server.stdin is not None and _server.stdout is not None
    _server.stdin.write(json.dumps(request) + "\n")
    _server.stdin.flush()
    answer = _server.stdout.readline()
    assert answer, f"the process that forks runs died with code {_server.wait()}"
    return json.loads(answer)


def _serve(answers: Any) -> None:
    from parallel import world

    world.import_libraries()
    import torch

    from pretrain.checkpoint import restore  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _start(**request) if "start" in request else [_wait(pid) for pid in request["wait"]]
        print(json.dumps(answer), file=answers, flush=True)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + TIMEOUT_S
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGABRT)
        time.sleep(0.005)
    return os.waitstatus_to_exitcode(ended[1])


def _start(start: list[str], output: str, processes: int) -> list[int]:
    with launch.open_store_socket() as store:
        return [_fork(start, Path(output), rank, processes, store) for rank in range(processes)]


def _fork(argv: list[str], output: Path, rank: int, processes: int, store: socket.socket) -> int:
    server = os.getpid()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 70
    try:
        from pretrain.train import rank as train_rank
        from tools import cli

        os.setsid()
        launch.die_with_parent(server)
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(target, stream)
        if processes == 1:
            code = cli.main(["train", *argv])
        else:
            os.environ.update(launch.rank_environment(rank, processes, store))
            code = train_rank.main(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    launch.die_with_parent(int(sys.argv[1]))
    # Requests come on stdin, answers go to stdout; what libraries print goes to stderr.
    to_test = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _serve(to_test)
