"""The end record of a rank, and errors that come from the machine or from a peer.

A job's supervisor finds in end records which rank failed first, and why (slurm/supervise/cause.py). This
module imports no torch, because a rank may fail before that import, and because the supervisor uses it too.
"""

import contextlib
import json
import os
import re
import time
from errno import EDQUOT, ENOMEM, ENOSPC, EROFS
from pathlib import Path

from parallel.launch import RankFacts, node_name

SUFFIX = ".end.json"
MESSAGE_LIMIT = 300
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
    """The end record of one rank of a Slurm job; other ranks write none.

    Its space on the disk is reserved at once. An error of writing is ignored, because it must not hide the
    error that ended the rank.
    """

    def __init__(self, facts: RankFacts) -> None:
        folder = facts.attempt_dir
        self._rank = facts.rank
        self._path = None if folder is None else Path(folder) / f"rank{facts.rank}{SUFFIX}"
        self._write("")

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
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
                file.write(text.encode(errors="replace").ljust(_ROOM))
            return unfinished
        return None
