"""Every command of README and docs is one that its program takes, for files that are there."""

import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import load_toml
from pretrain.comparison.config import make_plan
from pretrain.config import check_run_layout, load
from slurm.profile import load_profile
from tests.docs.pages import PAGES, PLACEHOLDERS, README, ROOT, Block, blocks, commands, whole_files
from tools.cli import parse

COMMANDS = [
    (block, words)
    for page in PAGES
    for block in blocks(page)
    if block.language == "bash"
    for words in commands(block)
]


def shown(value: object) -> str:
    return value.place if isinstance(value, Block) else " ".join(value) if isinstance(value, list) else ""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a reader: the repository's own files, where commands look for them."""
    for name in ("pretrain", "slurm", "tools", "tests"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=shown)
def test_command_is_legal(block: Block, words: list[str], folder: Path) -> None:
    program, *arguments = words
    files = whole_files(block.page)
    for name, text in files.items():
        Path(name).write_text(text)
    for name, kind in PLACEHOLDERS.items():
        Path(name).write_text(files[f"{kind}.toml"])
    match program:
        case "motley":
            check_motley(arguments, files.keys())
        case "bash" | "pytest":
            named = [word for word in arguments if "/" in word]
            assert all((ROOT / word.partition("::")[0]).exists() for word in named)
            assert named or program == "pytest"
        case "python":
            if arguments[0] == "-m":
                module = arguments[1].replace(".", "/")
                assert (ROOT / f"{module}.py").exists() or (ROOT / module / "__main__.py").exists()
            else:
                scripts = [b.text for b in blocks(block.page) if b.language == "python"]
                assert any(text.startswith(f"# {arguments[0]}") for text in scripts)
        case "torchrun":
            module = arguments[arguments.index("-m") + 1]
            assert (ROOT / module.replace(".", "/") / "__main__.py").exists()
        case "ruff" | "lint-imports" | "pyright" | "export":
            pass
        case _:
            pytest.fail(f"{block.place}: what does {program} have to do with Motley?")


def check_motley(arguments: Sequence[str], files: Sequence[str]) -> None:
    """Parse, then resolve what a run or a comparison becomes with the overrides of the command line."""
    args = parse(arguments)
    for name in re.findall(r"\S+\.toml", " ".join(arguments)):
        assert name in files or name in PLACEHOLDERS or (ROOT / name).exists(), f"{name} is nowhere"
    if (profile := getattr(args, "profile", None)) is not None and Path(profile).exists():
        load_profile(profile, nodes=getattr(args, "nodes", None))
    path = getattr(args, "run", getattr(args, "comparison", None))
    if getattr(args, "logs", None) is not None:
        return
    if path is None or not path.endswith(".toml") or not Path(path).exists():
        return
    if "arms" in load_toml(path):
        make_plan(path, [*args.overrides, "comparison.match=tokens"])
        return
    config = load(path, args.overrides)
    if args.verb == "train":
        check_run_layout(config, args.processes)


def test_a_wrong_command_is_seen(folder: Path) -> None:
    """The check itself can fail: on a flag, a file, a key and a layout."""
    Path("run.toml").write_text(whole_files(README)["run.toml"])
    with pytest.raises(SystemExit):
        check_motley(["train", "run.toml", "--ranks", "2"], ["run.toml"])
    with pytest.raises(AssertionError, match="nowhere"):
        check_motley(["train", "other.toml"], ["run.toml"])
    for override in ("optimizer.clip_norm=1", "parallel.tp=3"):
        with pytest.raises(ValueError):
            check_motley(["train", "run.toml", override], ["run.toml"])
