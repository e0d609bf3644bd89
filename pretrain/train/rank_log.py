"""Where what a rank prints goes: rank 0 to the terminal and its log, the others to their logs."""

import os
import sys
from pathlib import Path
from typing import NamedTuple, TextIO

from data_pipeline.files.printable import escape_output
from pretrain.run_files import rank_log


class Terminal(NamedTuple):
    """What a rank may say to the person beside its output: one line, and where the rest is."""

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


def log_rank(folder: Path, rank: int) -> Terminal:
    """Send this rank's output to folder/rank<n>.log (appended), with what libraries in C print.

    What rank 0 prints by Python goes to the terminal too. Other ranks would interleave there, and what C
    prints is about the machine and long. The terminal's stderr comes back, for the one line that a rank may
    say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / rank_log(rank)
    log = path.open("a")
    terminals = [
        os.fdopen(os.dup(stream.fileno()), "w", buffering=1, encoding=stream.encoding, errors=stream.errors)
        for stream in (sys.stdout, sys.stderr)
    ]
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log.fileno(), stream.fileno())
    if rank == 0:
        sys.stdout, sys.stderr = (Tee(terminal, log) for terminal in terminals)
        escape_output()
    return Terminal(terminals[1], path)
