"""What `motley train` says before it starts anything. The loop itself: tests/e2e/test_train_*.py."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.faults import ReaderDied
from data_pipeline.toml_config import ConfigError
from parallel.launch import LaunchError
from pretrain.checkpoint_folder import CheckpointError
from pretrain.config import load
from pretrain.finite import NonFiniteError
from pretrain.run_dir import RunDir
from pretrain.train import FAILED, USER_ERROR, _explain
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text
from tools.cli import main

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def write_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a good run's file, changed by `edit`."""
    write_tiny_data(tmp_path / "data")

    def write(edit: Callable[[dict[str, Any]], Any] = lambda values: None) -> Path:
        values = tiny_run(tmp_path / "data", tmp_path / "runs")
        edit(values)
        path = tmp_path / "run.toml"
        path.write_text(toml_text(values))
        return path

    return write


Edit = Callable[[dict[str, Any]], Any]

MISTAKES: dict[str, tuple[Edit, list[str], list[str]]] = {
    "a key with a typo": (
        lambda values: values["optimizer"].update(learning_rat=1e-3),
        [],
        ["optimizer.learning_rat: unknown key", 'did you mean "learning_rate"'],
    ),
    "an override with a typo": (
        lambda values: None,
        ["model.num_layer=3"],
        ["model.num_layer: unknown key", 'did you mean "num_layers"'],
    ),
    "an override without a value": (
        lambda values: None,
        ["seed"],
        ['override "seed": expected key=value'],
    ),
    "a step that is no number of sequences": (
        lambda values: None,
        ["tokens_per_step=100"],
        ["tokens_per_step = 100 is not a multiple of model.context_tokens = 64"],
    ),
    "data that does not fit": (
        lambda values: values["data"].update(train=[{"path": "nowhere/train"}]),
        [],
        ['data.train[0].path = "nowhere/train": no such folder'],
    ),
    "processes that do not divide the step": (
        lambda values: None,
        ["--processes", "3"],
        ["4 sequences per step cannot be split over dp = 3 ranks"],
    ),
    "no processes": (lambda values: None, ["--processes", "0"], ["--processes 0"]),
    "a disk that cannot be written": (
        lambda values: values.update(runs_dir="/proc/motley"),
        [],
        ["/proc/motley/tiny: cannot be written", "runs_dir="],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_nothing_starts(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], mistake: str
):
    edit, arguments, expected = MISTAKES[mistake]
    assert main(["train", str(write_run(edit)), *arguments]) == 2
    message = capsys.readouterr().err
    for part in expected:
        assert part in message, message
    assert "Traceback" not in message
    assert not (tmp_path / "runs").exists()


def test_a_run_file_that_is_not_there(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "nowhere.toml"]) == 2
    assert "nowhere.toml: no such file" in capsys.readouterr().err


def test_a_mistake_is_told_without_torch(write_run: Callable[..., Path]):
    path = write_run(lambda values: values["model"].update(vocab_tokens=40))
    code = (
        "import sys\nfrom tools.cli import main\n"
        f"assert main(['train', {str(path)!r}, '--processes', '2']) == 2\n"
        "raise SystemExit(int('torch' in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"), [([], "usage:"), (["model.vocab_tokens=40"], "set model.vocab_tokens=52")]
)
def test_a_rank_of_another_launcher_checks_too(
    tmp_path: Path, write_run: Callable[..., Path], arguments: list[str], message: str
):
    argv = [str(write_run()), *arguments] if arguments else []
    command = [sys.executable, "-m", "pretrain.train", *argv]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_broken_launcher_is_one_message(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    assert main(["train", str(write_run())]) == 2
    assert "RANK or WORLD_SIZE is set, but" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (ConfigError("x"), USER_ERROR, True),
        (LaunchError("x"), USER_ERROR, True),
        (CheckpointError("x"), FAILED, True),
        (NonFiniteError("x"), FAILED, True),
        (ReaderDied("x"), FAILED, True),
        (ValueError("x"), FAILED, False),
        (MemoryError(), FAILED, False),
    ],
)
def test_what_an_error_means(error: Exception, code: int, told: bool):
    assert _explain(error) == (code, told)


def test_a_directory_of_another_config_is_refused_before_its_data_is_looked_at(
    write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    path = write_run()
    RunDir.open(load(path), world_size=1, command=[]).close(status="stopped", reason="", exit_code=85, step=0)
    assert main(["train", str(path), "data.heldout=nowhere"]) == 2
    message = capsys.readouterr().err
    assert "was made by another config" in message and '/heldout" there, "nowhere" now' in message
