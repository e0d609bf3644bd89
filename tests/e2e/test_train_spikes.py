"""A run meets a step whose gradient leaps and one that is not finite: it goes on, and its books add up."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from pretrain.audit.report import audit, compare
from pretrain.checkpoint.folder import checkpoints, read_manifest
from pretrain.metrics import read_rows
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import CONTEXT_TOKENS, tiny_run, write_tiny_data
from tests.toml_text import toml_text

SEQUENCES, STEPS = 4, 24
LEAPS, BREAKS = 9, 13
"""Numbers of the steps of a run without spikes whose data are bad."""
SPIKES = json.dumps({LEAPS * SEQUENCES: 8.0, BREAKS * SEQUENCES: None})
MEASURED = ("train/", "eval/", "optim/", "data/", "compute/", "tokens", "step")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


def write_run(folder: Path, data: Path, on_spike: str) -> list[str]:
    """The arguments of a run that logs every step and saves every fifth."""
    values = tiny_run(data, folder / "runs") | {
        "on_spike": on_spike,
        "spike": {"norm_factor": 3.0, "window": 4},
        "every_steps": {"log": 1, "eval": 24, "checkpoint": 5},
        "evaluate": {"heldout_sequences": 4, "conditional_documents": 0},
    }
    (folder / "tiny.toml").write_text(toml_text(values))
    return [str(folder / "tiny.toml")]


def rows_of(folder: Path) -> dict[int, dict[str, Any]]:
    """Step -> all that was measured, without the times."""
    rows = read_rows(folder / "runs" / "tiny" / "metrics.jsonl")
    return {row["step"]: {n: v for n, v in row.items() if n.startswith(MEASURED)} for row in rows}


def tensors_of(folder: Path) -> Any:
    """The digests of all tensors in the newest checkpoint, and the optimizer's counters."""
    manifest, _ = read_manifest(checkpoints(folder / "runs" / "tiny" / "checkpoints")[-1][1])
    return {name: entry["digest"] for name, entry in manifest["tensors"].items()}, manifest["optimizer"]


def flops_of(rows: dict[int, dict[str, Any]], steps: list[int]) -> float:
    """The FLOPs of some steps of a run without spikes."""
    total = {0: 0.0} | {step: row["compute/train_flops"] for step, row in rows.items()}
    return sum(total[step] - total[step - 1] for step in steps)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> dict[int, dict[str, Any]]:
    """The rows of a run that meets no spike, and judges its steps."""
    folder = tmp_path_factory.mktemp("undisturbed")
    train(write_run(folder, data, "skip"), folder / "out")
    rows = rows_of(folder)
    assert rows[STEPS]["train/spikes"] == rows[STEPS]["train/lost_steps"] == 0
    return rows


def test_skipped_steps_are_left_out_and_told(tmp_path: Path, data: Path, undisturbed: dict[int, Any]):
    train(write_run(tmp_path, data, "skip"), tmp_path / "out", processes=2, spikes=SPIKES)
    rows, lost = rows_of(tmp_path), [LEAPS, BREAKS]
    assert [*rows] == [*range(1, STEPS + 1)]
    last, usual = rows[STEPS], undisturbed[STEPS]
    assert (last["train/spikes"], last["train/lost_steps"]) == (2, 2)
    assert last["train/lost_tokens"] == 2 * SEQUENCES * CONTEXT_TOKENS
    assert last["compute/lost_flops"] == flops_of(undisturbed, lost)
    for name in ("tokens", "compute/train_flops", "data/fingerprint", "data/epoch"):  # the same data
        assert last[name] == usual[name]
    for modality in ("text", "image", "speech"):
        name = f"train/tokens/{modality}"
        learned = {0: 0} | {step: row[name] for step, row in undisturbed.items()}
        assert last[name] == learned[STEPS] - sum(learned[step] - learned[step - 1] for step in lost)
    assert all("train/loss" not in rows[step] and "optim/grad_norm" not in rows[step] for step in lost)
    assert rows[BREAKS + 1]["train/loss"] == pytest.approx(undisturbed[BREAKS + 1]["train/loss"], rel=0.1)
    record = json.loads((tmp_path / "runs" / "tiny" / "record.json").read_text())["spikes"]
    assert [(event["step"], event["back_to"]) for event in record["events"]] == [(9, None), (13, None)]
    assert "gradient norm" in record["events"][0]["why"] and "samples" in record["events"][1]["why"]
    assert record["compute/lost_flops"] == last["compute/lost_flops"]


def test_rolled_back_and_killed_it_goes_on_with_later_data(
    tmp_path: Path, data: Path, undisturbed: dict[int, Any]
):
    """The first spike, at step 9, leads back to step 5; the step whose data break is then number 9 again."""
    folders = {name: tmp_path / name for name in ("left alone", "killed")}
    arguments = {}
    for name, folder in folders.items():
        folder.mkdir()
        arguments[name] = write_run(folder, data, "rollback")
    train(arguments["left alone"], tmp_path / "out", spikes=SPIKES)
    rows, lost = rows_of(folders["left alone"]), [*range(6, 14)]
    assert [*rows] == [*range(1, STEPS + 1)]
    for step in range(1, 6):
        assert rows[step] == undisturbed[step]
    last, usual = rows[STEPS], undisturbed[STEPS]
    assert (last["train/spikes"], last["train/lost_steps"]) == (2, len(lost))
    assert last["train/lost_tokens"] == len(lost) * SEQUENCES * CONTEXT_TOKENS
    assert last["tokens"] == usual["tokens"] + last["train/lost_tokens"]
    assert last["compute/lost_flops"] == flops_of(undisturbed, lost)
    # Step 6 is made of the data that step 14 of a run without spikes has.
    assert rows[6]["data/fingerprint"] == undisturbed[14]["data/fingerprint"]
    made = rows[6]["compute/train_flops"] - undisturbed[13]["compute/train_flops"]
    assert made == flops_of(undisturbed, [14])
    record = json.loads((folders["left alone"] / "runs" / "tiny" / "record.json").read_text())["spikes"]
    assert [(event["step"], event["back_to"]) for event in record["events"]] == [(9, 5), (9, 5)]

    run = Run(arguments["killed"], tmp_path / "out", spikes=SPIKES)
    metrics = folders["killed"] / "runs" / "tiny" / "metrics.jsonl"
    run.wait_until(
        lambda: metrics.exists() and any(row.get("train/spikes") == 2 for row in read_rows(metrics))
    )
    run.signal(signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL]
    train(arguments["killed"], tmp_path / "out", spikes=SPIKES)
    assert rows_of(folders["killed"]) == rows
    assert tensors_of(folders["killed"]) == tensors_of(folders["left alone"])
    runs = [folder / "runs" / "tiny" for folder in folders.values()]
    assert audit(runs[0]) and audit(runs[1]), "fingerprints of rows are those of the plan"
    assert compare(runs[0], runs[1])


def test_one_spike_too_many_ends_the_run(tmp_path: Path, data: Path):
    arguments = [*write_run(tmp_path, data, "skip"), "spike.max_spikes=1"]
    run = Run(arguments, tmp_path / "out", spikes=SPIKES)
    assert run.codes() == [1]
    assert f"motley train: step {BREAKS} is spike number 2 of the run: its loss or" in run.text()
    assert "spike.max_spikes = 1 allows no more" in run.text() and "Traceback" not in run.text()
