"""Where what a rank prints goes: rank 0 to the terminal and its log, the others to their logs."""

import os
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

from pretrain.run_files import rank_log


class Terminal(NamedTuple):
    """What a redirected rank may still say to the person: one line, and where the rest is."""

    stream: TextIO
    log: Path


class Tee:
    """A text stream that writes to another and to a log; lines that redraw themselves stay out of the log."""

    def __init__(self, stream: TextIO, log: TextIO) -> None:
        self._stream, self._log = stream, log
        self.encoding, self.errors = stream.encoding, stream.errors

    def write(self, text: str) -> int:
        if "\r" not in text:
            self._log.write(text)
            self._log.flush()
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


def log_rank(folder: Path, rank: int) -> Terminal | None:
    """Send this rank's output to folder/rank<n>.log (appended).

    Rank 0 keeps printing to the terminal too: None. The others are redirected as a whole, with what libraries
    in C print, since on the terminal they would interleave; they get the terminal's stderr back.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_log(rank)
    log = path.open("a")
    if rank == 0:
        sys.stdout, sys.stderr = Tee(sys.stdout, log), Tee(sys.stderr, log)
        return None
    terminal = Terminal(os.fdopen(os.dup(2), "w"), path)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    return terminal
