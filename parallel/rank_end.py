"""The end record of a rank, and errors that come from the machine or from a peer.

A job's supervisor finds in end records which rank failed first, and why (slurm/supervise/cause.py), and so
does the launcher of ranks on one machine (parallel/spawn.py). This module imports no torch, because a rank
may fail before that import, and because both use it too.
"""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Sequence
from errno import EDQUOT, ENOMEM, ENOSPC, EROFS
from pathlib import Path
from typing import Any

from parallel.launch import node_name

SUFFIX = ".end.json"
_RECORDS = f"rank*{SUFFIX}"
MESSAGE_LIMIT = 300
_ABORTED = 128 + signal.SIGABRT
_ROOM = 2048
"""Bytes that are reserved for a record at the start, so that a rank can report that the disk is full."""

# The patterns match names of exceptions and also messages: of C++ libraries, of threads and other ranks, and
# of processes that died before they could raise.
_TEXTS = {
    "out_of_memory": r"out of memory|OutOfMemoryError|can't allocate memory|cannot allocate memory"
    r"|MemoryError|std::bad_alloc|out of shared memory",
    "disk": r"No space left on device|Disk quota exceeded|Read-only file system",
    # These are messages of gloo, of torch's store, and of NCCL and its watchdog.
    "lost_peer": r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe"
    r"|Timed out (?:waiting|after)|gloo/transport|timed out after \d+ms"
    r"|failed to connect|failed to recv|client socket"
    r"|Watchdog caught collective operation timeout|ncclRemoteError|NCCL (?:communicator|operation).*abort",
}
_DISK_ERRORS = {ENOSPC, EDQUOT, EROFS}


def kind_of_error(error: BaseException) -> str | None:
    """ "out_of_memory", "disk", "lost_peer" or None, judged by this error alone, without its causes."""
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, OSError):
        return "disk" if error.errno in _DISK_ERRORS else "out_of_memory" if error.errno == ENOMEM else None
    kind = kind_of_text(f"{type(error).__name__}: {error}")
    if kind == "lost_peer":
        # torch's errors are RuntimeErrors; other errors are about connections that reading data lost.
        return kind if isinstance(error, RuntimeError) else None
    return kind or ("lost_peer" if re.match(r"Dist\w*Error", type(error).__name__) else None)


def kind_of_text(text: str) -> str | None:
    """`kind_of_error` for printed text."""
    return next((kind for kind, words in _TEXTS.items() if re.search(words, text, re.IGNORECASE)), None)


def behind(error: BaseException) -> list[tuple[BaseException, BaseException]]:
    """The chain of errors that led to an error, root cause first, as pairs (error, reported error).

    The reported error is the last one that was raised `from` the error. Errors after the root cause, such as
    lost peers, can be ignored.
    """
    chain = []
    reported: BaseException | None = error
    current: BaseException | None = error
    while current is not None and reported is not None:
        chain.append((current, reported))
        if current.__cause__ is not None:
            current = current.__cause__
        else:
            current = reported = None if current.__suppress_context__ else current.__context__
    return chain[::-1]


def one_line(text: str) -> str:
    """The first line of a message, with the second if the first ends with a colon; at most 300 characters."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()] or [""]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 3] + "..."


class EndRecord:
    """The end record of a rank of a Slurm job, or of `spawn`; other ranks write none.

    Its space on the disk is reserved at once. An error of writing is ignored, because it must not hide the
    error that ended the rank.
    """

    def __init__(self, folder: str | None, rank: int) -> None:
        """`folder`: of the records of all ranks of the attempt; None: no record is written."""
        self._rank = rank
        self._path = None if folder is None else Path(folder) / f"rank{rank}{SUFFIX}"
        self._write("")

    def has_peer_ended(self) -> bool:
        """Whether another rank of the attempt has left its record, and so has ended."""
        return self._path is not None and any(path != self._path for path in self._path.parent.glob(_RECORDS))

    def close(self, *, exit_code: int, kind: str, message: str, step: int | None) -> None:
        """Write the record and rename it into place."""
        record = {
            **{"rank": self._rank, "host": node_name(), "exit_code": exit_code},
            **{"kind": kind, "message": one_line(message), "time": time.time(), "step": step},
        }
        if (unfinished := self._write(json.dumps(record, ensure_ascii=False))) and self._path is not None:
            unfinished.rename(self._path)

    def _write(self, text: str) -> Path | None:
        """Overwrite the reserved space; returns its file, or None if it cannot be written."""
        if self._path is None:
            return None
        unfinished = self._path.with_name(self._path.name + ".tmp")
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT, 0o666), "wb") as file:
                file.write(text.encode(errors="replace").ljust(_ROOM))
            return unfinished
        return None


def rank_ends(attempt_dir: Path) -> list[dict[str, Any]]:
    """The end records of an attempt's ranks, sorted by rank."""
    ends = []
    for path in attempt_dir.glob(_RECORDS):
        try:
            ends.append(json.loads(path.read_text()))
        except (OSError, ValueError):  # the file system lost a record that was written
            continue
    return sorted(ends, key=lambda end: end["rank"])


def first_failure(ends: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The end record of the rank that failed first; None if none failed. For records of which none is
    missing.

    A rank that a signal killed goes first: no other rank's error does that, but for SIGABRT, by which
    libraries end a rank that has lost another. A rank that only lost another goes last.
    """

    def order(end: dict[str, Any]) -> int:
        killed = end["kind"] == "killed"
        return (
            3 if end["kind"] == "lost_peer" else 1 if not killed else 2 if end["exit_code"] == _ABORTED else 0
        )

    failed = [end for end in ends if end["kind"] not in ("done", "stopped")]
    lowest = min(map(order, failed), default=0)
    return earliest([end for end in failed if order(end) == lowest]) if failed else None


def earliest(ends: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The earliest end record.

    Some errors are raised on all ranks with one message. If that names a rank, the record of this rank is
    returned.
    """
    first = min(ends, key=lambda end: end["time"])
    named = re.search(r"\brank (\d+)\b", first["message"])
    return next(
        (
            end
            for end in ends
            if named and end["rank"] == int(named[1]) and end["message"] == first["message"]
        ),
        first,
    )
