"""Links of README and docs lead somewhere, and files that they name are there."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import LINKING_PAGES, PAGES, PLACEHOLDERS, README, ROOT, prose, whole_files

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_CODE = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"(?<![\w/.<>*-])((?:[\w.-]+/)*[\w-]+\.(?:py|toml|md|sh|j2|txt))(?![\w/])")
TREES = ("pretrain", "parallel", "data_pipeline", "slurm", "tools", "tests", "docs")
_FOLDER = re.compile(rf"(?<![\w/.<>-])((?:{'|'.join(TREES)})/(?:\w+/)*)(?![\w<*.])")
NAMES = {path.name for tree in TREES for path in (ROOT / tree).rglob("*")} | {p.name for p in ROOT.iterdir()}


def relative(page: Path) -> str:
    return str(page.relative_to(ROOT))


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", LINKING_PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{relative(page)}: {link} leads nowhere"
        assert not anchor or anchor in anchors(target), f"{relative(page)}: {link}: no such heading"


@pytest.mark.parametrize("page", (*PAGES, *(ROOT / "docs/results").glob("*.md")), ids=relative)
def test_named_files_are_there(page: Path) -> None:
    """In code spans; a name without a folder may stand anywhere in the repository."""
    shown = whole_files(page).keys() | PLACEHOLDERS.keys()
    for span in _CODE.findall(prose(page)):
        for name in _FILE.findall(span):
            there = (ROOT / name).exists() or (page.parent / name).exists()
            assert there or name in shown or ("/" not in name and name in NAMES), f"{relative(page)}: {name}"
        for folder in _FOLDER.findall(span):
            assert (ROOT / folder).is_dir(), f"{relative(page)}: {folder}"


def test_readme_is_short() -> None:
    assert len(README.read_text()) <= 6_000, "move something to docs/"
