"""README and docs as data: their fenced blocks, config examples, commands, links and mentioned paths.

A ```toml block names its file in its first line. `# run.toml` is a whole file. `# in run.toml` is a part of
one, which is laid over the whole file of that name; the same page or another shows that. The first letters of
the name say what the file configures: run, compare, question, site, data.
"""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import validate
from data_pipeline.tokenize.config import tokenize_config
from pretrain.comparison.compare_config import CompareConfig
from pretrain.comparison.foreign.question import ForeignConfig
from pretrain.config import RunConfig
from slurm.profile import Profile

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
EXAMPLE_PAGES = tuple(
    ROOT / f"docs/{name}.md"
    for name in ("slurm", "data", "compare", "train", "limits", "extending", "generate")
)
"""Pages that begin with an example, up to their first heading of the second level."""
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
"""Pages whose commands and config examples must work."""
LINKING_PAGES = (*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs/results").glob("*.md")))

CHECKS: dict[str, Callable[[dict[str, Any], str], object]] = {
    "run": partial(validate, RunConfig),
    "compare": partial(validate, CompareConfig),
    "question": lambda values, source: validate(
        ForeignConfig, {"name": "runs", "arms": ["dense", "mot"]} | values, source
    ),
    "site": partial(validate, Profile),
    "data": tokenize_config,
}
"""What a file configures -> a function of (values, source) that raises ConfigError for illegal values."""
PLACEHOLDERS = {"RUN.toml": "run", "COMPARE.toml": "compare", "SITE.toml": "site", "DATA.toml": "data"}
"""Files that a command leaves to the reader -> what they configure."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NAME_LINE = re.compile(r"# (in )?((run|compare|question|site|data)\w*\.toml)\b")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str
    line: int
    """Of the page, from 1: where the block's own text begins."""

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class ConfigExample:
    """A ```toml block: a config file, or a part of one."""

    block: Block
    file: str
    kind: str
    """A key of CHECKS."""
    is_part: bool

    @property
    def values(self) -> dict[str, Any]:
        return tomllib.loads(self.block.text)


RUN_TOO = {"train": "### Extend, go back, branch"}
"""Name of a page -> heading of a section, whose blocks up to its first ```text are run behind the opening."""


def blocks(page: Path, *, opening: bool = False, section: str | None = None) -> list[Block]:
    """The fenced blocks of a page in order; `opening`: those before its first heading of the second level,
    and those of RUN_TOO; `section`: those under the heading of the second level of this name."""
    text = page.read_text()
    start = 0 if section is None else text.index(f"\n## {section}\n") + 1
    spans = [(start, text.find("\n## ", start) if opening or section is not None else len(text))]
    if opening and (heading := RUN_TOO.get(page.stem)) is not None:
        start = text.index(heading)
        spans.append((start, text.index("\n```\n", text.index("```text", start)) + len("\n```\n")))
    return [
        Block(page, match[1], match[2], text[: match.start(2)].count("\n") + 1)
        for start, end in spans
        for match in _FENCE.finditer(text[:end], start)
    ]


def config_examples(page: Path) -> list[ConfigExample]:
    """The ```toml blocks of a page. Raises AssertionError for one whose first line names no file."""
    return [_config_example(block) for block in blocks(page) if block.language == "toml"]


def _config_example(block: Block) -> ConfigExample:
    match = _NAME_LINE.match(block.text)
    assert match, f"{block.place}: the first line must be such as '# run.toml' or '# in site.toml: why'"
    return ConfigExample(block, match[2], match[3], match[1] is not None)


def whole_files(page: Path) -> dict[str, str]:
    """File name -> text of the whole config files that README and docs show. Of equal names the page's own
    counts."""
    examples = [e for source in (README, *EXAMPLE_PAGES, page) for e in config_examples(source)]
    return {example.file: example.block.text for example in examples if not example.is_part}


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`, table by table."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each line of a ```bash block, without comments."""
    for line in block.text.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _FENCE.sub("", page.read_text())
