"""A Python whose processes start with everything imported: each is forked from one that waits for requests.

A fresh interpreter spends seconds on imports before it trains. `start` forks a process instead, and
`executable()` is the path of a program that does so wherever a test would run `python -m MODULE`,
`python -c CODE` or `python FILE.py`. Of a forked process the arguments, environment, working directory, open
files, signals and exit code are those of a fresh one. What it finds imported and looked up differs, and /proc
shows the arguments and environment of that program beside it, whose end ends it too.
"""

import array
import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

_MAX_FILES = 250
"""Linux passes at most 253 files with one message."""
_IMPORTED = (
    "matplotlib.backends.backend_svg",
    "pretrain.checkpoint.restore",
    "pretrain.comparison.report.page",
    "pretrain.comparison.run",
    "pretrain.train.loop",
    "scipy.stats",
)
"""Modules that verbs import, some of them late and slowly: reports spend 3 s on it."""
_address: str | None = None
"""That of a server which another test runner has started."""
_FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class Process:
    """A forked process; closing its connection kills it."""

    def __init__(self, connection: socket.socket, pid: int) -> None:
        self.pid = pid
        self._connection = connection
        self._code: int | None = None

    def ended(self) -> bool:
        return self._code is not None or bool(select.select([self._connection], [], [], 0)[0])

    def wait(self, timeout_s: float | None = None) -> int:
        """The exit code, negative for a signal. A process that runs longer than `timeout_s` is aborted."""
        if self._code is None:
            if not select.select([self._connection], [], [], timeout_s)[0]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGABRT)
            # The answer is empty where the server itself was killed.
            self._code = int(self._connection.recv(64) or -signal.SIGKILL)
            self._connection.close()
        return self._code


def start(
    address: str,
    argv: Sequence[str],
    environment: Mapping[str, str],
    cwd: str,
    files: Mapping[int, int],
    *,
    like: int | None = None,
) -> Process:
    """Fork `python ARGV...` from the server at `address`.

    `files`: number of a file in the new process -> descriptor here, 0 to 2 among them. `like`: a process
    whose hostname and mounts it has, else those of the server.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect(address)
    content = json.dumps([list(argv), dict(environment), cwd, list(files), like]).encode()
    with tempfile.TemporaryFile() as request:  # a message of this kind of socket has a limit, a file has none
        request.write(content)
        request.flush()
        descriptors = array.array("i", [request.fileno(), *files.values()])
        connection.sendmsg([b"start"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, descriptors)])
        pid = int(connection.recv(64))
    return Process(connection, pid)


def use(address: str) -> None:
    """Let this test runner use the server of another one."""
    global _address
    _address = address


def server() -> str:
    """The address of this test runner's server."""
    return _address or _own_server()


@functools.cache
def _own_server() -> str:
    """Fork a server from the process that forks ranks."""
    from parallel.testing import run_on_ranks

    folder = Path(tempfile.mkdtemp(prefix="motley-warm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    address = str(folder / "socket")
    python, here = shlex.quote(sys.executable), str(Path(__file__).parent)
    (folder / "python.py").write_text(
        f"import sys\nsys.path.insert(0, {here!r})\n"
        f"import warm_python\nwarm_python.run_here({address!r}, {sys.executable!r})\n"
    )
    (folder / "python").write_text(f'#!/bin/sh\nexec {python} -IS "$0.py" "$@"\n')
    (folder / "python").chmod(0o755)
    run_on_ranks(_fork_server, 1, address)
    alive = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alive.connect(address)
    alive.send(b"the server lives as long as this connection")
    atexit.register(alive.close)
    return address


def executable() -> str:
    """The path of a program that takes the arguments of `python` and starts warm."""
    return _executable(server())


def _executable(address: str) -> str:
    return str(Path(address).parent / "python")


def run_here(address: str, python: str) -> None:
    """Be the program `executable()`: start a process with this one's arguments, files and environment."""
    if sys.argv[1:2] == [
        "-u"
    ]:  # launchers ask for unbuffered output, which is flushed at the end in any case
        del sys.argv[1]
    if not sys.argv[1:] or (sys.argv[1].startswith("-") and sys.argv[1] not in ("-m", "-c")):
        os.execv(python, [python, *sys.argv[1:]])
    listing = os.open("/proc/self/fd", os.O_RDONLY | os.O_DIRECTORY)
    numbers = [number for number in map(int, os.listdir(listing)) if number != listing][:_MAX_FILES]
    os.close(listing)
    # Signals are kept back until there is a process that they can be forwarded to.
    signal.pthread_sigmask(signal.SIG_BLOCK, _FORWARDED)
    ignored = [number for number in _FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
    files = {number: number for number in numbers}
    process = start(address, sys.argv[1:], os.environ, os.getcwd(), files, like=os.getpid())
    for number in set(_FORWARDED) - set(ignored):
        signal.signal(number, lambda received, _: os.kill(process.pid, received))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _FORWARDED)
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _fork_server(address: str) -> None:
    """On a rank of parallel/testing.py: leave a server behind, which outlives the rank."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(address)
    listening.listen(64)
    if os.fork() == 0:
        try:
            os.setsid()
            nothing = os.open(os.devnull, os.O_RDWR)
            _keep_open({0: nothing, 1: nothing, 2: nothing, 3: listening.detach()})
            _serve(socket.socket(fileno=3), address)
        finally:
            os._exit(1)


def _serve(listening: socket.socket, address: str) -> None:
    """Fork a keeper for every connection that asks for a process; leave when the first connection ends."""
    for module in _IMPORTED:
        importlib.import_module(module)
    _know_what_runs_look_up()
    gc.freeze()  # no forked process searches what is imported here

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel then reaps keepers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    alive, _ = listening.accept()
    alive.recv(64)
    while True:
        if alive in select.select([listening, alive], [], [])[0]:
            os._exit(0)
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            alive.close()
            _keep(connection, _executable(address))
        connection.close()


def _know_what_runs_look_up() -> None:
    """Look up the state of the checkout once, and let runs measure the peak of this machine in a tenth of the
    usual time: a quarter of what a tiny run takes."""
    from pretrain import run_dir
    from pretrain.train import meter

    run_dir.code_state = functools.cache(run_dir.code_state)
    run_dir.code_state()
    meter.measure_peak_flops = functools.partial(meter.measure_peak_flops, seconds=0.02)


def _keep(connection: socket.socket, python: str) -> None:
    """Fork the process that the connection asks for, and send its pid and its exit code.

    The process is killed when the connection closes, so that no process outlives the one that asked.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, ancillary, *_ = connection.recvmsg(64, socket.CMSG_SPACE(4 * (_MAX_FILES + 1)))
    received = array.array("i")
    received.frombytes(ancillary[0][2])
    with open(received[0], "rb") as request:
        request.seek(0)
        argv, environment, cwd, numbers, like = json.load(request)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        connection.close()
        sys.executable = python
        _become(keeper, argv, environment, cwd, dict(zip(numbers, received[1:], strict=True)), like)
    for descriptor in received[1:]:
        os.close(descriptor)
    connection.send(str(pid).encode())
    process = os.pidfd_open(pid)
    if process not in select.select([process, connection], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.send(str(code).encode())
    os._exit(0)


def _become(
    keeper: int,
    argv: list[str],
    environment: dict[str, str],
    cwd: str,
    files: dict[int, int],
    like: int | None,
) -> None:
    """Turn this forked process into `python ARGV...`; it never returns."""
    from parallel import launch

    code = 70
    try:
        launch.die_with_parent(keeper)
        if like is not None:
            _enter_namespaces_of(like)
        os.setsid()
        _keep_open(files)
        for number in _FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(cwd)
        code = _run(argv)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(BaseException):
                stream.flush()
        os._exit(code)


def _enter_namespaces_of(pid: int) -> None:
    """Take a process's hostname and mounts: nodes of tests/slurm_cluster/cluster.py have their own."""
    for kind in ("uts", "mnt"):
        theirs = f"/proc/{pid}/ns/{kind}"
        if os.readlink(theirs) != os.readlink(f"/proc/self/ns/{kind}"):
            namespace = os.open(theirs, os.O_RDONLY)
            if ctypes.CDLL(None, use_errno=True).setns(namespace, 0):
                raise OSError(ctypes.get_errno(), f"{theirs} cannot be entered")
            os.close(namespace)


def _keep_open(files: Mapping[int, int]) -> None:
    """Make the open files of this process these and no others: number -> descriptor now."""
    # Each file goes to a high number first, so that none is overwritten before it has its own.
    high = {number: fcntl.fcntl(source, fcntl.F_DUPFD, 500) for number, source in files.items()}
    os.closerange(0, 500)
    for number, source in high.items():
        os.dup2(source, number)
        os.close(source)


def _run(argv: list[str]) -> int:
    """Run -m MODULE, -c CODE or a file as the main program; returns its exit code."""
    try:
        match argv:
            case ["-m", module, *rest]:
                sys.path.insert(0, os.getcwd())
                sys.argv = [module, *rest]
                runpy.run_module(module, run_name="__main__", alter_sys=True)
            case ["-c", code, *rest]:
                sys.path.insert(0, "")
                sys.argv = ["-c", *rest]
                exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            case [file, *rest]:
                sys.path.insert(0, str(Path(file).parent))
                sys.argv = [file, *rest]
                runpy.run_path(file, run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
