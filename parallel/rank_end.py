"""How a rank ended: the record that it leaves beside its log, and errors that are the machine's or a peer's.

A job's supervisor finds in these records which rank failed first, and why (slurm/supervise/cause.py). Imports
no torch: a rank may fail before it gets that far, and the supervisor reads with the same words.
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
"""Bytes kept for a record from the start: where a full disk is what ends the rank, it can still say so."""

# Under the words of a type are those that only a message has: of libraries in C++, of what a thread or
# another rank has told, and of a process that could not even raise.
_TEXTS = {
    "out_of_memory": r"out of memory|OutOfMemoryError|can't allocate memory|cannot allocate memory"
    r"|MemoryError|std::bad_alloc|out of shared memory",
    "disk": r"No space left on device|Disk quota exceeded|Read-only file system",
    # gloo, the store that ranks meet at, NCCL and its watchdog
    "lost_peer": r"Connection closed by peer|Connection reset by peer|Connection refused|Broken pipe"
    r"|Timed out (?:waiting|after)|gloo/transport|timed out after \d+ms"
    r"|failed to connect|failed to recv|client socket"
    r"|Watchdog caught collective operation timeout|ncclRemoteError|NCCL (?:communicator|operation).*abort",
}
_DISK_ERRORS = {ENOSPC, EDQUOT, EROFS}


def kind_of_error(error: BaseException) -> str | None:
    """ "out_of_memory", "disk" or "lost_peer" if this error itself, not those behind it, says so."""
    if isinstance(error, MemoryError):
        return "out_of_memory"
    if isinstance(error, OSError):
        return "disk" if error.errno in _DISK_ERRORS else "out_of_memory" if error.errno == ENOMEM else None
    found = kind_of_text(f"{type(error).__name__}: {error}")
    if found == "lost_peer":
        # Not where a connection of the data's was lost; torch has its own classes below RuntimeError.
        return found if isinstance(error, RuntimeError) else None
    return found or ("lost_peer" if re.match(r"Dist\w*Error", type(error).__name__) else None)


def kind_of_text(text: str) -> str | None:
    """As `kind_of_error`, of what was printed."""
    return next((kind for kind, words in _TEXTS.items() if re.search(words, text, re.IGNORECASE)), None)


def behind(error: BaseException) -> list[tuple[BaseException, BaseException]]:
    """An error and all that led to it, what happened first coming first. Beside each is the error that it was
    told as: the last that was raised `from` it."""
    chain = []
    told_as: BaseException | None = error
    following: BaseException | None = error
    while following is not None and told_as is not None:
        chain.append((following, told_as))
        if following.__cause__ is not None:
            following = following.__cause__
        else:
            following = told_as = None if following.__suppress_context__ else following.__context__
    return chain[::-1]


def one_line(text: str) -> str:
    """The first line of a message, and the next where it only announces that; at most 300 characters."""
    lines = [" ".join(line.split()) for line in text.strip().splitlines() if line.strip()] or [""]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return line if len(line) <= MESSAGE_LIMIT else line[: MESSAGE_LIMIT - 3] + "..."


class EndRecord:
    """The record of one rank. Of a rank that is none of a Slurm job's: nothing is written.

    Room for it is taken at once. What keeps a record from being written is not told: it must not hide how the
    rank ended.
    """

    def __init__(self, facts: RankFacts) -> None:
        folder = facts.attempt_dir
        self._rank = facts.rank
        self._path = None if folder is None else Path(folder) / f"rank{facts.rank}{SUFFIX}"
        self._write("")

    def close(self, *, exit_code: int, kind: str, message: str, step: int | None) -> None:
        """Write it, in one rename."""
        record = {
            **{"rank": self._rank, "host": node_name(), "exit_code": exit_code},
            **{"kind": kind, "message": one_line(message), "time": time.time(), "step": step},
        }
        if (unfinished := self._write(json.dumps(record, ensure_ascii=False))) and self._path is not None:
            unfinished.rename(self._path)

    def _write(self, text: str) -> Path | None:
        """Into the room, in place; the file that it is in, None if it cannot be written."""
        if self._path is None:
            return None
        unfinished = self._path.with_name(self._path.name + ".tmp")
        with contextlib.suppress(OSError):
            with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT, 0o644), "wb") as file:
                file.write(text.encode(errors="replace").ljust(_ROOM))
            return unfinished
        return None
