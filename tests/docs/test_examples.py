"""The example that opens a page of docs is run as it stands, on tiny data, and prints what the page shows."""

import subprocess
from pathlib import Path

import pytest

from parallel.launch import child_environment
from tests.docs.pages import EXAMPLE_PAGES, ROOT, Block, blocks, commands, whole_files
from tests.pretrain.tiny_data import write_tiny_data
from tests.pretrain.tiny_tokenizers import write_tokenized_data
from tests.warm_python import executable

REFUSED = "# exit code 2"
"""How a page marks a command that is to be refused."""


def run(words: list[str], folder: Path) -> tuple[int, str]:
    """Exit code and output of a `motley` or `python` command in `folder`; reports have no figures."""
    undrawn = ["tests.undrawn"] if words[:2] == ["motley", "compare"] else []
    program = ["-m", *undrawn, "tools.cli"] if words[0] == "motley" else []
    result = subprocess.run(
        [executable(), *program, *words[1:]],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=child_environment(1, threads=1) | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"},
    )
    return result.returncode, result.stdout


def assert_shows(output: str, block: Block) -> None:
    """Every line of the block is one of the output, in order; `...` stands for lines in between, and behind
    a beginning for the rest of its line."""
    left = iter(" ".join(line.split()) for line in output.splitlines())
    for line in block.text.splitlines():
        wanted = " ".join(line.split())
        if wanted in ("", "..."):
            continue
        beginning = wanted.removesuffix("...")
        whole_line = beginning == wanted
        found = any(printed == wanted if whole_line else printed.startswith(beginning) for printed in left)
        assert found, f"{block.place}: no {wanted!r} in\n{output}"


def test_the_example_of_runs_made_elsewhere(tmp_path: Path) -> None:
    page, output = ROOT / "docs/compare.md", ""
    for block in blocks(page, section="Runs made elsewhere"):
        match block.language:
            case "csv":
                (tmp_path / "runs.csv").write_text(block.text)
            case "toml":
                (tmp_path / "question.toml").write_text(block.text)
            case "bash":
                for words in commands(block):
                    code, output = run(words, tmp_path)
                    assert code == 0, output
            case "text":
                assert_shows(output, block)
    assert output.count("Report: ") == 1


@pytest.mark.parametrize("page", EXAMPLE_PAGES, ids=lambda page: page.stem)
def test_opening_example(page: Path, tmp_path: Path) -> None:
    opening = blocks(page, opening=True)
    assert any(block.language == "bash" for block in opening), f"{page}: opens without a command"
    for name, text in whole_files(page).items():
        (tmp_path / name).write_text(text)
    # Tiny data has no tokenizers, without which no id becomes a picture.
    write = write_tokenized_data if page.stem == "generate" else write_tiny_data
    write(tmp_path / "data" / "demo_small")
    output = ""
    for block in opening:
        match block.language:
            case "python":
                name = block.text.splitlines()[0].removeprefix("# ")
                (tmp_path / name).write_text(block.text)
            case "bash":
                results = [run(words, tmp_path) for words in commands(block)]
                output = "".join(text for _, text in results)
                expected = [2 if REFUSED in line else 0 for line in block.text.splitlines()]
                assert [code for code, _ in results] == expected, output
            case "text":
                assert_shows(output, block)
