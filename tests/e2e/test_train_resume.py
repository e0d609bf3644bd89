"""A run that was killed, told to stop or damaged ends with the loss curve of one that was left alone."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.checkpoint.folder import checkpoints
from pretrain.comparison.run_documents import read_documents
from pretrain.metrics import read_rows
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.pretrain.tiny_vectors import vectors_run, write_tiny_vectors
from tests.toml_text import toml_text

MEASURED = ("train/", "eval/", "optim/", "data/", "compute/", "tokens", "step")
"""Names of metrics that may not depend on when a run was interrupted; the others are times and memory."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_tiny_data(folder)
    return folder


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    write_tiny_vectors(folder)
    return folder


@pytest.fixture
def run_file(tmp_path: Path, data: Path) -> Path:
    path = tmp_path / "tiny.toml"
    path.write_text(toml_text(resumed_run(data, tmp_path / "runs")))
    return path


def resumed_run(data: Path, runs_dir: Path) -> dict[str, Any]:
    """A tiny run whose last evaluation keeps losses per document; with images as vectors if the data has
    them."""
    values = (vectors_run if data.name.startswith("vectors") else tiny_run)(data, runs_dir)
    values["evaluate"]["last_documents"] = 20
    return values


Undisturbed = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Undisturbed:
    """(ranks, ZeRO stage, data) -> rows of a run that nobody disturbed; trained once."""
    rows: dict[tuple[int, int, Path], list[dict[str, Any]]] = {}

    def of(processes: int, zero_stage: int, source: Path = data) -> list[dict[str, Any]]:
        if (processes, zero_stage, source) not in rows:
            folder = tmp_path_factory.mktemp("undisturbed")
            (folder / "tiny.toml").write_text(toml_text(resumed_run(source, folder / "runs")))
            arguments = [str(folder / "tiny.toml"), f"parallel.zero_stage={zero_stage}"]
            train(arguments, folder / "out", processes=processes)
            rows[processes, zero_stage, source] = curve(folder / "runs" / "tiny")
        return rows[processes, zero_stage, source]

    return of


def curve(run_dir: Path) -> list[dict[str, Any]]:
    """All that was measured, without the times."""
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name.startswith(MEASURED)} for row in rows]


def assert_documents_are_sealed(run_dir: Path) -> None:
    """documents.json has the digest in the record, and the losses of the last row."""
    record = json.loads((run_dir / "record.json").read_text())
    documents = read_documents(run_dir, record, "eval/")
    assert documents is not None and documents.step == 24 and len(documents.names) == 20
    row = read_rows(run_dir / "metrics.jsonl")[-1]
    for modality, nats in documents.nats.items():
        loss = nats.sum() / documents.targets[modality].sum()
        assert row[f"eval/documents/loss/{modality}"] == pytest.approx(loss, abs=1e-12)


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return max((row["step"] for row in read_rows(path)), default=0) if path.exists() else 0


def names(run_dir: Path) -> list[str]:
    folder = run_dir / "checkpoints"
    return os.listdir(folder) if folder.is_dir() else []


MOMENTS: dict[str, Callable[[Path], bool]] = {
    "before the first checkpoint": lambda run: last_step(run) >= 3,
    "while saving": lambda run: any(name.startswith("saving.step_00000010") for name in names(run)),
    "after saving": lambda run: "step_00000010" in names(run),
    "after rows that no checkpoint holds": lambda run: last_step(run) >= 18,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_at_any_moment_the_curve_is_that_of_an_undisturbed_run(
    tmp_path: Path, run_file: Path, undisturbed: Undisturbed, moment: str
):
    run_dir = tmp_path / "runs" / "tiny"
    run = Run([str(run_file)], tmp_path / "out")
    run.wait_until(lambda: MOMENTS[moment](run_dir))
    run.signal(signal.SIGKILL)
    assert run.codes() == [-signal.SIGKILL]
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 19, "train/lo')  # the row that the kill may have torn
    train([str(run_file)], tmp_path / "out")

    assert curve(run_dir) == undisturbed(1, 1)
    assert_documents_are_sealed(run_dir)
    steps = [row["step"] for row in read_rows(run_dir / "metrics.jsonl")]
    assert steps == [3, 6, 8, 9, 12, 15, 16, 18, 21, 24]
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == steps
    assert not [name for name in names(run_dir) if not name.startswith("step_")]
    first, second = json.loads((run_dir / "record.json").read_text())["attempts"]
    assert "killed" in first["reason"] and second["reason"] == "all steps done"
    assert second["from_step"] in (0, 5, 10, 15)


@pytest.mark.parametrize("zero_stage", [pytest.param(0, marks=pytest.mark.full), 3])
def test_killed_again_and_again_on_two_ranks(
    tmp_path: Path, vectors: Path, undisturbed: Undisturbed, zero_stage: int
):
    """With images as vectors, whose noise is that of the undisturbed run."""
    run_file = tmp_path / "tiny.toml"
    run_file.write_text(toml_text(resumed_run(vectors, tmp_path / "runs")))
    run_dir = tmp_path / "runs" / "tiny"
    arguments = [str(run_file), f"parallel.zero_stage={zero_stage}"]
    for rank, moment in enumerate(("after saving", "after rows that no checkpoint holds")):
        run = Run(arguments, tmp_path / "out", processes=2)
        run.wait_until(lambda moment=moment: MOMENTS[moment](run_dir))
        run.signal(signal.SIGKILL, rank)  # one rank, and then, as the launcher does, the other
        run.signal(signal.SIGKILL)
        assert run.codes() == [-signal.SIGKILL] * 2
    train(arguments, tmp_path / "out", processes=2)
    assert curve(run_dir) == undisturbed(2, zero_stage, vectors)
    # Ranks add in another order than one process does: fp32 over 24 steps, measured 4e-8.
    for one, two in zip(undisturbed(1, 1, vectors), undisturbed(2, zero_stage, vectors), strict=True):
        for name in ("data/fingerprint", "data/epoch", "compute/train_flops", "train/tokens/image"):
            assert one[name] == two[name]
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-6)
        if "eval/loss" in one:
            assert two["eval/loss"] == pytest.approx(one["eval/loss"], rel=1e-6)


@pytest.mark.parametrize(("number", "processes"), [(signal.SIGTERM, 1), (signal.SIGUSR2, 2)])
def test_told_to_stop_it_saves_within_the_step_and_exits_85(
    tmp_path: Path,
    run_file: Path,
    undisturbed: Undisturbed,
    number: int,
    processes: int,
):
    run_dir = tmp_path / "runs" / "tiny"
    # Checkpoints only when told to, so that the one found is the signal's; rows at every step tell the step.
    arguments = [str(run_file), "every_steps.checkpoint=1000", "every_steps.log=1", "total_tokens=512000"]
    run = Run(arguments, tmp_path / "out", processes=processes)
    run.wait_until(lambda: last_step(run_dir) >= 7)
    run.signal(number, rank=processes - 1)  # not even rank 0 gets it: ranks agree
    run.wait_until(lambda: any(name.startswith("saving.") for name in names(run_dir)))
    run.signal(number)  # a second one, in the middle of the save
    run.signal(signal.SIGTERM)
    assert run.codes() == [85] * processes, run.text()
    ((step, _),) = checkpoints(run_dir / "checkpoints")
    assert last_step(run_dir) == step >= 7
    attempt = json.loads((run_dir / "record.json").read_text())["attempts"][-1]
    assert (attempt["exit_code"], attempt["to_step"]) == (85, step)
    assert step < 2000


def test_stopped_and_continued_is_undisturbed(tmp_path: Path, run_file: Path, undisturbed: Undisturbed):
    run_dir = tmp_path / "runs" / "tiny"
    run = Run([str(run_file)], tmp_path / "out")
    run.wait_until(lambda: last_step(run_dir) >= 6)
    run.signal(signal.SIGINT)
    assert run.codes() == [85], run.text()
    (attempt,) = json.loads((run_dir / "record.json").read_text())["attempts"]
    assert checkpoints(run_dir / "checkpoints")[-1][0] == attempt["to_step"]  # not only the one of step 5
    train([str(run_file)], tmp_path / "out")
    assert curve(run_dir) == undisturbed(1, 1)


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(
    tmp_path: Path, run_file: Path, undisturbed: Undisturbed
):
    run_dir = tmp_path / "runs" / "tiny"
    run = Run([str(run_file)], tmp_path / "out")
    run.wait_until(lambda: "step_00000010" in names(run_dir))
    run.signal(signal.SIGKILL)
    run.codes()
    _, newest = checkpoints(run_dir / "checkpoints")[-1]
    victim = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    (tmp_path / "out").write_text("")
    train([str(run_file)], tmp_path / "out")
    assert f"{newest} is damaged and passed over" in (tmp_path / "out").read_text()
    assert victim.name in (tmp_path / "out").read_text()
    assert curve(run_dir) == undisturbed(1, 1)
