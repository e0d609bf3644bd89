"""Text of the demo corpus: the documentation in every Python, reference topics and library docstrings."""

import ast
import sysconfig
import textwrap
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError

HELDOUT_EVERY = 12
"""All of a module or topic is held out when the checksum of its name is a multiple of this number."""
MAX_CHARACTERS = 700
"""Paragraphs are joined into passages of at most so many characters."""
MIN_CHARACTERS = 160
"""Shorter passages are dropped."""
_SKIP_FOLDERS = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "turtledemo",
    "__pycache__",
}


@dataclass(frozen=True)
class Passage:
    """A few consecutive paragraphs of a module or topic, whose name is `origin`."""

    origin: str
    text: str

    @property
    def heldout(self) -> bool:
        return zlib.crc32(self.origin.encode()) % HELDOUT_EVERY == 0


@cache
def library_passages() -> tuple[Passage, ...]:
    """All passages of this Python's documentation, in a fixed order; no paragraph occurs twice."""
    seen: set[str] = set()
    passages = tuple(
        Passage(origin, text) for origin, document in _documents() for text in _gather(document, seen)
    )
    if not passages:
        raise ConfigError(
            f"this Python ({sysconfig.get_path('stdlib')}) carries no source of its standard library, which "
            "the demo corpus takes its text from; use a usual CPython"
        )
    return passages


def _documents() -> Iterator[tuple[str, str]]:
    for name, text in sorted(_topics().items()):
        yield f"topic/{name}", text
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if _SKIP_FOLDERS.isdisjoint(relative.parts):
            for docstring in _docstrings(path):
                yield f"module/{relative.as_posix()}", docstring


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave the reference out; docstrings are most of the text
        return {}
    return topics


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):  # a template or a test file for another encoding
        return
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield docstring
            waiting += reversed(node.body)


def _gather(document: str, seen: set[str]) -> Iterator[str]:
    """Passages of a document: paragraphs that are not in `seen`, joined until a passage is long enough."""
    gathered = ""
    for paragraph in _paragraphs(document):
        if paragraph in seen:
            continue
        seen.add(paragraph)
        if gathered and len(gathered) + 2 + len(paragraph) > MAX_CHARACTERS:
            if len(gathered) >= MIN_CHARACTERS:
                yield gathered
            gathered = ""
        gathered = f"{gathered}\n\n{paragraph}" if gathered else paragraph
    if len(gathered) >= MIN_CHARACTERS:
        yield gathered


def _paragraphs(document: str) -> Iterator[str]:
    for paragraph in textwrap.dedent(document).expandtabs().split("\n\n"):
        lines = [line.rstrip() for line in paragraph.strip("\n").split("\n")]
        while lines:  # a paragraph longer than a passage is cut between its lines
            size, count = 0, 0
            while count < len(lines) and (count == 0 or size + len(lines[count]) < MAX_CHARACTERS):
                size += len(lines[count]) + 1
                count += 1
            piece = "\n".join(lines[:count]).rstrip()
            if piece.strip():
                yield piece
            lines = lines[count:]
