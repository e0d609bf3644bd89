"""What a run rests on is the run's own and unchanged: another file is refused by name, or passed over."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import checkpoints, file_digest
from pretrain.metrics import read_rows
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.toml, runs/done/tiny, runs/killed/tiny (after step 10) and runs/other/tiny, a run at
    another learning rate."""
    folder = tmp_path_factory.mktemp("identity")
    write_tiny_data(folder / "data")
    (folder / "tiny.toml").write_text(toml_text(tiny_run(folder / "data", folder / "runs")))
    train([str(folder / "tiny.toml"), f"runs_dir={folder}/runs/done"], folder / "out")
    other = [f"runs_dir={folder}/runs/other", "optimizer.learning_rate=1e-3"]
    train([str(folder / "tiny.toml"), *other], folder / "out")
    run = Run([str(folder / "tiny.toml"), f"runs_dir={folder}/runs/killed"], folder / "out")
    run.wait_until(lambda: (folder / "runs/killed/tiny/checkpoints/step_00000010").is_dir())
    run.signal(signal.SIGKILL)
    run.codes()
    return folder


@pytest.fixture
def killed(runs: Path, tmp_path: Path) -> Path:
    """A copy of the killed run, to spoil and continue."""
    return Path(shutil.copytree(runs / "runs/killed/tiny", tmp_path / "tiny"))


def go_on(runs: Path, run_dir: Path) -> tuple[int, str]:
    """(exit code, what was said) of `motley train` with the file of the run."""
    output = run_dir.parent / "out"
    output.unlink(missing_ok=True)
    run = Run([str(runs / "tiny.toml"), f"runs_dir={run_dir.parent}"], output)
    return run.codes()[0], output.read_text()


def newest(run_dir: Path) -> Path:
    return checkpoints(run_dir / "checkpoints")[-1][1]


def curve(run_dir: Path) -> list[dict[str, Any]]:
    kept = ("step", "train/", "eval/", "data/")
    return [
        {name: value for name, value in row.items() if name.startswith(kept)}
        for row in read_rows(run_dir / "metrics.jsonl")
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def without_identity(run_dir: Path) -> None:
    """Make the run one of a version that knew no identities."""
    record = json.loads((run_dir / "record.json").read_text())
    run_id = record.pop("run")["id"]
    (run_dir / "record.json").write_text(json.dumps(record | {"format": 1}))
    rows = run_dir / "metrics.jsonl"
    rows.write_text(rows.read_text().replace(f'"run": "{run_id}", ', ""))
    for _, path in checkpoints(run_dir / "checkpoints"):
        saved = json.loads((path / "state.json").read_text())
        del saved["state"]["rows_sha256"]
        (path / "state.json").write_text(json.dumps(saved))
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["run"], manifest["sha256"]
        manifest["files"]["state.json"] = file_digest(path / "state.json")
        (path / "manifest.json").write_text(json.dumps(manifest | {"format": 3}))


PASSED_OVER: dict[str, Change] = {
    "a count of optimizer steps": lambda run: edit(newest(run) / "manifest.json", '"step": 1', '"step": 2'),
    "the position in the data": lambda run: edit(newest(run) / "state.json", '"num_rows": ', '"num_rows": 1'),
}


@pytest.mark.parametrize("changed", PASSED_OVER)
def test_a_changed_digit_of_a_checkpoint_is_passed_over(runs: Path, killed: Path, changed: str) -> None:
    at = newest(killed)
    PASSED_OVER[changed](killed)
    code, said = go_on(runs, killed)
    assert code == 0 and f"{at} is damaged and passed over" in said, said
    assert curve(killed) == curve(runs / "runs/done/tiny")


def foreign_checkpoint(run_dir: Path, runs: Path) -> str:
    copied = run_dir / "checkpoints/step_00000024"
    shutil.copytree(runs / "runs/other/tiny/checkpoints/step_00000024", copied)
    return f"{copied} is a checkpoint of another run: its run id is "


def foreign_metrics(run_dir: Path, runs: Path) -> str:
    shutil.copy(runs / "runs/other/tiny/metrics.jsonl", run_dir)
    return f"{run_dir}/metrics.jsonl: the row of step 3 is one of another run: it has run id "


def changed_metrics(run_dir: Path, runs: Path) -> str:
    edit(run_dir / "metrics.jsonl", '"train/loss": ', '"train/loss": 1')
    return f"{run_dir}/metrics.jsonl: holds other rows (SHA-256 differs) up to step 1"


def missing_config(run_dir: Path, runs: Path) -> str:
    (run_dir / "config.resolved.json").unlink()
    return f"{run_dir}/config.resolved.json is missing, and record.json is there"


@pytest.mark.parametrize("spoil", [foreign_checkpoint, foreign_metrics, changed_metrics, missing_config])
def test_what_is_not_the_runs_own_is_refused_by_name(
    runs: Path, killed: Path, spoil: Callable[[Path, Path], str]
) -> None:
    expected = spoil(killed, runs)
    saved, rows = files(killed / "checkpoints"), (killed / "metrics.jsonl").read_bytes()
    code, said = go_on(runs, killed)
    assert code == 2 and said.count("motley train: ") == 1, said
    assert f"motley train: {expected}" in said
    assert files(killed / "checkpoints") == saved
    assert (killed / "metrics.jsonl").read_bytes() == rows


def test_a_run_of_an_earlier_version_goes_on_and_says_once_what_its_checkpoints_lack(
    runs: Path, killed: Path
) -> None:
    without_identity(killed)
    code, said = go_on(runs, killed)
    assert code == 0, said
    assert said.count("is of an earlier version and does not name its run") == 1
    assert curve(killed) == curve(runs / "runs/done/tiny")


def test_all_files_of_a_run_directory_have_the_mode_of_a_new_file(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "new").write_text("")
    mode = (tmp_path / "new").stat().st_mode
    found = {path: path.stat().st_mode for path in (runs / "runs/done").rglob("*") if path.is_file()}
    assert {path for path in found if path.suffix == ".safetensors"}
    assert {path.name: oct(other) for path, other in found.items() if other != mode} == {}
