"""Text for a terminal: characters that move a cursor, start a line or turn the order of reading are escaped.

A name in a tar, a key of a file or a word of a record may hold them, and would then change or forge what a
person reads.
"""

import contextlib
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

_HIDDEN_CATEGORIES = {"Cc", "Cf", "Cs", "Zl", "Zp"}
"""Unicode categories: controls (ESC, C1, line breaks), formats (bidirectional overrides), halves of surrogate
pairs, and the separators of lines and paragraphs."""
_JOINERS = "\u200c\u200d"
"""Formats that words of some languages need; they join letters and do nothing else."""


def hidden_characters(text: str) -> str:
    """The characters of `text` that a terminal obeys instead of showing them, each once, in order."""
    if text.isprintable():
        return ""
    hidden = (c for c in text if unicodedata.category(c) in _HIDDEN_CATEGORIES and c not in _JOINERS)
    return "".join(dict.fromkeys(hidden))


def printable(text: str, *, keep: str = "") -> str:
    r"""`text` with its hidden characters escaped as Python writes them, such as \x1b and \n, but for those in
    `keep`.
    """
    escaped = {ord(c): repr(c)[1:-1] for c in hidden_characters(text) if c not in keep}
    return text.translate(escaped) if escaped else text


def first_names(names: Sequence[str], most: int) -> str:
    """The first names of a list, at most `most`, and how many more there are: "a, b and 5 more"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """While the block runs, stdout and stderr escape what is printed, but for line breaks and tabs."""
    streams = sys.stdout, sys.stderr
    escape_output()
    try:
        yield
    finally:
        sys.stdout, sys.stderr = streams


def escape_output() -> None:
    """From now on, stdout and stderr escape what is printed, but for line breaks and tabs."""
    sys.stdout, sys.stderr = _escaping(sys.stdout), _escaping(sys.stderr)


class _Escaping:
    """A text stream that escapes what is written to it. All else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`. A carriage return at its start is kept: a progress bar redraws its line with it."""
        start = "\r" * text.startswith("\r")
        self._stream.write(start + printable(text[len(start) :], keep="\n\t"))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _escaping(stream: TextIO) -> Any:
    return _Escaping(stream)
