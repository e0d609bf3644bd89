"""A disk that fails on purpose: from a chosen call on, Python's functions on files raise what a disk raises.

    python -m tests.faults.injected_disk '{"operation": "write", ...}' tools.cli train RUN.toml

The functions of `io`, `os` and of the two libraries that write tensors are replaced in this process, so a
fault needs no mount and no root, and is met at the same call every time. As in the kernel, an error of a path
names the path, and one of a descriptor (read, write, fsync) names none. Only files under one folder fail.
"""

import builtins
import dataclasses
import errno
import io
import json
import os
import re
import runpy
import signal
import sys
import tarfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPERATIONS = ("open", "read", "write", "fsync", "rename", "mkdir", "unlink")
ERRORS = ("ENOSPC", "EROFS", "EIO", "EACCES")
KILL, SIGNALS = "SIGKILL", ("SIGKILL", "SIGTERM", "SIGINT", "SIGUSR2")
"""They may stand for an error: the process sends itself the signal where the disk would have failed."""
_NAMED = {"open", "rename", "mkdir", "unlink"}


@dataclass(frozen=True)
class DiskFault:
    """Calls number `number` (from 1) and, if it `lasts`, later ones of an operation fail with `error`.

    Counted are the calls on files under `root` whose path below it holds the regular expression `match`.
    """

    operation: str
    number: int
    error: str
    root: str
    report: str
    """File to which the path of every call that fails is appended, a line each."""
    match: str = ""
    lasts: bool = False

    def to_json(self) -> str:
        """The first argument of `main`."""
        return json.dumps(dataclasses.asdict(self))


class _Disk:
    def __init__(self, fault: DiskFault) -> None:
        self.fault, self._calls, self._lock = fault, 0, threading.Lock()
        self._prefix = fault.root.rstrip("/") + "/"

    def path(self, file: Any) -> str | None:
        """The path of a file or descriptor under the root; None for one that no fault concerns."""
        try:
            name = os.readlink(f"/proc/self/fd/{file}") if isinstance(file, int) else os.fspath(file)
        except (TypeError, OSError):
            return None
        if isinstance(name, bytes):
            name = os.fsdecode(name)
        name = os.path.abspath(name)
        return name if name.startswith(self._prefix) else None

    def meet(self, operation: str, file: Any) -> None:
        """Count a call; raise the error if this is the one that fails."""
        fault = self.fault
        if operation != fault.operation or (path := self.path(file)) is None:
            return
        if not re.search(fault.match, path.removeprefix(self._prefix)):
            return
        with self._lock:
            self._calls += 1
            if self._calls != fault.number and not (fault.lasts and self._calls > fault.number):
                return
            with _OPEN(fault.report, "a") as file:
                file.write(f"{path}\n")
        if fault.error in SIGNALS:
            os.kill(os.getpid(), getattr(signal, fault.error))
            return
        number = getattr(errno, fault.error)
        raise OSError(number, os.strerror(number), *([path] if operation in _NAMED else []))


_OPEN = io.open


class _File(io.FileIO):
    """A raw file whose reads and writes may fail."""

    disk: _Disk

    def write(self, data: Any) -> int:
        self.disk.meet("write", self.name)
        return super().write(data)

    def readinto(self, buffer: Any) -> int:
        self.disk.meet("read", self.name)
        return super().readinto(buffer)

    def readall(self) -> bytes:
        self.disk.meet("read", self.name)
        return super().readall()


def install(fault: DiskFault) -> None:
    """Replace the functions of this process for good; meant for a process that ends with its fault."""
    disk = _Disk(fault)
    opened = _opener(disk)
    io.open = builtins.open = opened  # pyright: ignore[reportAttributeAccessIssue]
    setattr(tarfile, "bltn_open", opened)  # noqa: B010
    for name, operation in {
        **{"open": "open", "fsync": "fsync", "write": "write", "pread": "read", "rename": "rename"},
        **{"replace": "rename", "mkdir": "mkdir", "unlink": "unlink", "truncate": "write"},
    }.items():
        setattr(os, name, _before(disk, operation, getattr(os, name)))
    _install_tensors(disk)


def _before(disk: _Disk, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def met(file: Any, *args: Any, **kwargs: Any) -> Any:
        disk.meet(operation, args[0] if operation == "rename" else file)  # what a rename would replace
        return function(file, *args, **kwargs)

    return met


def _opener(disk: _Disk) -> Callable[..., Any]:
    def opened(
        file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
        newline: Any = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        if isinstance(file, int) or opener is not None or disk.path(file) is None:
            return _OPEN(file, mode, buffering, encoding, errors, newline, closefd, opener)
        disk.meet("open", file)
        raw = _File.__new__(_File)
        raw.disk = disk
        raw.__init__(os.path.abspath(os.fspath(file)), mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        size = io.DEFAULT_BUFFER_SIZE
        buffered: Any = (
            io.BufferedRandom(raw, size) if "+" in mode
            else io.BufferedReader(raw, size) if "r" in mode
            else io.BufferedWriter(raw, size)
        )  # fmt: skip
        if "b" in mode:
            return buffered
        text = io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)
        text.mode = mode  # pyright: ignore[reportAttributeAccessIssue]
        return text

    return opened


def _install_tensors(disk: _Disk) -> None:
    """The writers and the reader of tensors, which open files in Rust and C++, with their own errors."""
    import torch
    from safetensors import SafetensorError

    from pretrain.checkpoint import shards

    def failing(
        function: Callable[..., Any], operations: tuple[str, ...], error: type[Exception], at: int
    ) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            try:
                for operation in operations:
                    disk.meet(operation, args[at])
            except OSError as caught:
                raise error(f"I/O error: {caught.strerror} (os error {caught.errno})") from None
            return function(*args, **kwargs)

        return called

    shards.save_file = failing(shards.save_file, ("open", "write"), SafetensorError, 1)
    shards.safe_open = failing(shards.safe_open, ("open", "read"), SafetensorError, 0)
    torch.save = failing(torch.save, ("open", "write"), RuntimeError, 1)


def main() -> None:
    """Run a module as a program, with its arguments, on a disk with the fault of the first argument."""
    fault, module, *_ = sys.argv[1:]
    del sys.argv[1:3]
    install(DiskFault(**json.loads(fault)))
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
