"""A comparison from the file to the page, with real runs: failed, stopped, gone on with, reported."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from parallel.launch import child_environment
from pretrain.comparison.run import run_comparison
from pretrain.metrics import read_rows
from tests.pretrain.tiny_data import VOCABULARY, tiny_run, write_tiny_data
from tests.toml_text import toml_text
from tests.warm_python import executable

TIMEOUT_S = 240


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    """Two arms, one seed, 24 steps, over freshly written data."""
    write_tiny_data(tmp_path / "data")
    (tmp_path / "base.toml").write_text(toml_text(tiny_run(tmp_path / "data", tmp_path / "runs")))
    path = tmp_path / "compare.toml"
    towers = {name: "all" for name in VOCABULARY.modalities}
    values = {
        "name": "tiny_compare",
        "question": "Does it run?",
        "base": "base.toml",
        "baseline": "dense",
        "vary": ["model.towers"],
        "seeds": [3],
        "concurrent_runs": 2,
        "arms": {"dense": {"model": {"towers": towers}}, "mot": {}},
    }
    path.write_text(toml_text(values))
    return path


def start(path: Path, out: Path, *more: str) -> "subprocess.Popen[bytes]":
    with out.open("wb") as file:
        return subprocess.Popen(
            [executable(), "-m", "tools.cli", "compare", str(path), *more],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=child_environment(1, threads=1) | {"CUDA_VISIBLE_DEVICES": ""},
        )


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)


def test_failed_stopped_resumed_reported_and_not_run_again(comparison: Path, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "tiny_compare"
    dense, mot = (directory / f"{arm}_seed3" for arm in ("dense", "mot"))

    # The plan is sound, and then the disk is not: one run cannot write its checkpoints. The other goes on.
    (mot / "checkpoints").parent.mkdir(parents=True)
    (mot / "checkpoints").write_text("in the way")
    process = start(comparison, tmp_path / "first.log")
    wait_until(lambda: (directory / "comparison.json").exists(), process)
    assert not (dense / "metrics.jsonl").exists()  # the plan is written before anything runs
    assert process.wait(TIMEOUT_S) not in (0, 85)
    log = (tmp_path / "first.log").read_text()
    assert "mot_seed3 failed" in log and "cannot be written" in log and "No report" in log
    assert last_step(dense) == 24

    (mot / "checkpoints").unlink()
    process = start(comparison, tmp_path / "second.log")
    wait_until(lambda: (mot / "metrics.jsonl").exists(), process)
    process.send_signal(signal.SIGTERM)
    code, log = process.wait(TIMEOUT_S), (tmp_path / "second.log").read_text()
    assert "1 done already" in log
    assert code == 0 if last_step(mot) == 24 else (code == 85 and "To go on: motley compare" in log), log

    process = start(comparison, tmp_path / "third.log")
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "third.log").read_text()
    assert f"Report: {directory / 'report' / 'index.html'}" in (tmp_path / "third.log").read_text()
    assert last_step(mot) == 24
    summary = json.loads((directory / "report" / "summary.json").read_text())
    assert summary["same_data"]["proven"] and summary["step"] == 24 and not summary["interim"]
    assert {c["modality"] for c in summary["contrasts"]} == {*VOCABULARY.modalities, "all"}
    assert summary["contrasts"][0]["winner"] is None  # one seed
    cost = summary["systems"]
    assert cost["mot"]["train_flops"] == cost["dense"]["train_flops"] > 0  # equal tokens are equal compute

    written = (mot / "metrics.jsonl").read_bytes()
    assert run_comparison(comparison) == 0
    assert (mot / "metrics.jsonl").read_bytes() == written


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_rows(run / "metrics.jsonl")), default=0)


@pytest.mark.full  # the two above start such runs, and test_rate_grid.py holds what follows from them
def test_a_grid_of_rates_comes_first_and_goes_on(comparison: Path, tmp_path: Path) -> None:
    directory = tmp_path / "runs" / "tiny_compare"
    grid = "rates = [1e-4, 3e-3, 1e3]\ntuning_seeds = [7]\n"  # at the last one nothing is learned
    comparison.write_text(grid + comparison.read_text())
    overrides = ["total_tokens=1_536", "optimizer.schedule.warmup_steps=1", "every_steps.checkpoint=6"]
    process = start(comparison, tmp_path / "grid.log", *overrides, "--first-only")
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "grid.log").read_text()
    log = (tmp_path / "grid.log").read_text()
    assert "2 arms x 3 rates x 1 tuning seed(s) = 6 runs; 0 have ended" in log
    assert "Learning rate of mot: 0.003, of 3 rates x 1 tuning seed(s)" in log
    assert not (directory / "mot_seed3").exists()

    process = start(comparison, tmp_path / "runs.log", *overrides)
    assert process.wait(TIMEOUT_S) == 0, (tmp_path / "runs.log").read_text()
    summary = json.loads((directory / "report" / "summary.json").read_text())
    assert [choice["rate"] for choice in summary["rates"]] == [3e-3, 3e-3]
    assert (
        json.loads((directory / "mot_seed3/config.resolved.json").read_text())["optimizer"]["learning_rate"]
        == 3e-3
    )
