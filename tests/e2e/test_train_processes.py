"""Real processes in the way of each other, at the end of a disk, after a loss that is no number."""

import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.checkpoint.folder import checkpoints
from pretrain.metrics import read_rows
from tests.e2e.warm import REPOSITORY, Run, train
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data
from tests.toml_text import toml_text
from tests.warm_python import executable
from tools.cli import main


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


@pytest.fixture
def write_run(tmp_path: Path, data: Path) -> Callable[..., Path]:
    """Writes a good run's file, changed by `edit`."""

    def write(edit: Callable[[dict[str, Any]], Any] = lambda values: None) -> Path:
        values = tiny_run(data, tmp_path / "runs")
        edit(values)
        path = tmp_path / "run.toml"
        path.write_text(toml_text(values))
        return path

    return write


def test_done_is_done_and_another_config_is_refused(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    short = "total_tokens=1280"
    path = write_run(lambda values: values["data"].pop("heldout"))
    train([str(path), short], tmp_path / "out")
    run_dir = tmp_path / "runs" / "tiny"
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 5]
    assert not any(name.startswith("eval/") for row in rows for name in row)
    before = {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()}

    assert main(["train", str(path), short]) == 0
    assert f"{run_dir} is done: 5 of 5 steps" in capsys.readouterr().out
    for override, line in (
        ("total_tokens=6144", "total_tokens: 1280 there, 6144 now"),
        ("optimizer.learning_rate=0.1", "optimizer.learning_rate: 0.003 there, 0.1 now"),
    ):
        overrides = [override] if override.startswith("total") else [short, override]
        assert main(["train", str(path), *overrides]) == 2
        message = capsys.readouterr().err
        assert (
            line in message
            and "name=tiny-2" in message
            and f"{run_dir} was made by another config" in message
        )
    assert {file: file.read_bytes() for file in run_dir.rglob("*") if file.is_file()} == before
    shutil.rmtree(run_dir / "checkpoints")
    assert main(["train", str(path), short]) == 2
    assert "was done at step 5, and none of its checkpoints is left" in capsys.readouterr().err


def test_two_at_once_are_refused(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    path = write_run(lambda values: values.update(total_tokens=10_000 * 256))
    run_dir = tmp_path / "runs" / "tiny"
    run = Run([str(path)], tmp_path / "out")
    run.wait_until(lambda: (run_dir / "metrics.jsonl").exists())
    assert main(["train", str(path)]) == 2
    message = capsys.readouterr().err
    assert f"{run_dir} is in use by pid {run.pids[0]}" in message
    run.signal(9)
    assert run.codes() == [-9]


def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing_over_good_checkpoints(
    tmp_path: Path, write_run: Callable[..., Path]
):
    def edit(values: dict[str, Any]) -> None:
        values["optimizer"] = {"learning_rate": 1e30, "schedule": {"kind": "constant"}}
        values["every_steps"] = {"log": 1, "eval": 100, "checkpoint": 1}

    run = Run([str(write_run(edit))], tmp_path / "out", processes=2)
    assert run.codes() == [1, 1], run.text()
    run_dir = tmp_path / "runs" / "tiny"
    saved = [step for step, _ in checkpoints(run_dir / "checkpoints")]
    message = (run_dir / "logs" / "rank0.log").read_text()
    assert f"step {saved[-1] + 1} is not finite" in message
    assert "rank 1, micro-batch 0: text loss" in message and "samples tokens-0000" in message
    assert "Traceback" not in message
    assert read_rows(run_dir / "metrics.jsonl")[-1]["step"] == saved[-1]
    attempt = json.loads((run_dir / "record.json").read_text())["attempts"][-1]
    assert attempt["exit_code"] == 1 and "NonFiniteError" in attempt["reason"]


def test_a_rank_that_waits_for_a_hung_one_leaves_at_sigterm(tmp_path: Path, write_run: Callable[..., Path]):
    def edit(values: dict[str, Any]) -> None:
        values["total_tokens"] = 100_000 * values["tokens_per_step"]
        values["every_steps"] = {"log": 1, "eval": 100_000, "checkpoint": 100_000}

    path = str(write_run(edit))
    hangs = {"early": "before its first step", "late": "in its step"}
    runs = {"early": Run([path, "name=early"], tmp_path / "early", processes=2)}
    runs["early"].signal(signal.SIGSTOP, rank=1)  # at once, before they meet
    runs["late"] = Run([path, "name=late"], tmp_path / "late", processes=2)
    rows = tmp_path / "runs" / "late" / "metrics.jsonl"
    runs["late"].wait_until(lambda: rows.exists() and len(read_rows(rows)) >= 5)
    runs["late"].signal(signal.SIGSTOP, rank=1)
    for run in runs.values():
        run.signal(signal.SIGTERM, rank=0)
    for name, where in hangs.items():
        assert runs[name].code(0) == 85, runs[name].text()  # collectives would wait for 600 s
        runs[name].signal(signal.SIGKILL)
        assert runs[name].codes() == [85, -signal.SIGKILL]
        log = (tmp_path / "runs" / name / "logs" / "rank0.log").read_text()
        assert f"SIGTERM: left {where} after " in log and "Traceback" not in log
        attempt = json.loads((tmp_path / "runs" / name / "record.json").read_text())["attempts"][-1]
        assert attempt["exit_code"] == 85 and f"left {where}" in attempt["reason"]
        assert checkpoints(tmp_path / "runs" / name / "checkpoints") == []


def test_a_rank_that_lost_another_keeps_its_traceback_in_its_log(
    tmp_path: Path, write_run: Callable[..., Path]
):
    path = write_run(lambda values: values.update(total_tokens=10_000 * 256))
    run = Run([str(path)], tmp_path / "out", processes=2)
    run.wait_until(lambda: (tmp_path / "runs" / "tiny" / "metrics.jsonl").exists())
    run.signal(signal.SIGKILL, rank=1)
    assert run.codes() == [1, -signal.SIGKILL]
    assert "Traceback" in (tmp_path / "runs" / "tiny" / "logs" / "rank0.log").read_text()
    said = run.text()
    assert "Traceback" not in said and "Error" not in said, said


def test_a_disk_that_fills_up_leaves_the_checkpoints_before(tmp_path: Path, write_run: Callable[..., Path]):
    path = write_run()
    run_dir = tmp_path / "runs" / "tiny"
    run = Run([str(path)], tmp_path / "out")
    run.wait_until(lambda: bool(checkpoints(run_dir / "checkpoints")))
    # Where the next save begins there is a file in the way; root may write into any folder.
    (run_dir / "checkpoints" / "saving.step_00000015").write_text("")
    assert run.codes() == [1], run.text()
    assert "checkpoint" in run.text() and "cannot be written" in run.text() and "Traceback" not in run.text()
    assert [step for step, _ in checkpoints(run_dir / "checkpoints")][-1] == 10


def test_ranks_of_one_command_train_log_and_end(tmp_path: Path, write_run: Callable[..., Path]):
    path = write_run(lambda values: values["every_steps"].update(log=1))
    command = [executable(), "-m", "tools.cli", "train", str(path), "total_tokens=1280", "--processes", "2"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert result.returncode == 0, result.stderr
    run_dir = tmp_path / "runs" / "tiny"
    assert "tiny: 5/5 step, text" in result.stderr and "tokens/s" in result.stderr
    assert "Warning" not in result.stderr
    assert f"{run_dir}: all steps done, step 5 of 5 is saved" in result.stdout
    heldout = read_rows(run_dir / "metrics.jsonl")[-1]["eval/loss"]
    assert f"{run_dir}: held-out loss {heldout:.4f} (text " in result.stdout
    assert "tiny: 5/5 step, text" in (run_dir / "logs" / "rank0.log").read_text()
    assert (run_dir / "logs" / "rank1.log").exists()
    rows = read_rows(run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert ["time/eval_s" in row for row in rows] == ["eval/loss" in row for row in rows]
    assert rows[-1]["time/eval_s"] > 0
    attempt = json.loads((run_dir / "record.json").read_text())["attempts"][0]
    assert attempt["layout"] == {"processes": 2, "dp": 2, "tp": 1, "pp": 1, "zero_stage": 1}
    last = rows[-1]
    tokens = sum(last[f"train/tokens/{m}"] for m in VOCABULARY.modalities)
    assert 0.8 * last["tokens"] < tokens <= last["tokens"] == 1280
    assert 0 < last["speed/mfu_frac"] < 1
    assert last["compute/train_flops"] > rows[0]["compute/train_flops"] > 0
