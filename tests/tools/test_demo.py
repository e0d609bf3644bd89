"""tools/demo.sh: the data that it makes are those that its comparison reads."""

import shutil
import subprocess
from pathlib import Path

import pytest

from pretrain.comparison.config import make_plan

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """demo.sh beside a set-up that does nothing and a motley that prints its arguments."""
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/demo.sh", tmp_path / "tools/demo.sh")
    (tmp_path / "tools/setup.sh").touch()
    motley = tmp_path / ".venv/bin/motley"
    motley.parent.mkdir(parents=True)
    motley.write_text('#!/bin/sh\necho "$@"\n')
    motley.chmod(0o755)
    return tmp_path


def demo(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash") or "bash"
    return subprocess.run([bash, "tools/demo.sh", *arguments], cwd=checkout, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [(), ("--full",)], ids=["short", "full"])
def test_a_comparison_reads_what_was_tokenized_for_it(checkout: Path, arguments: tuple[str, ...]) -> None:
    result = demo(checkout, *arguments)
    assert result.returncode == 0, result.stderr
    corpus, tokenize, compare, *_ = (line.split() for line in result.stdout.splitlines())
    assert (corpus[0], tokenize[0], compare[0]) == ("demo-corpus", "tokenize", "compare")
    assert tokenize[1] == corpus[1]
    for run in make_plan(ROOT / compare[1]).runs:
        assert [source.path for source in run.config.data.train] == [f"{tokenize[2]}/train"]
        assert run.config.data.heldout == f"{tokenize[2]}/heldout"


def test_an_unknown_argument_is_refused_before_anything_is_made(checkout: Path) -> None:
    result = demo(checkout, "--long")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith('demo: "--long" is unknown; call "bash tools/demo.sh"')
