"""Training documents that are damaged on disk: the run ends, or goes on and says so wherever one looks."""

import io
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.index import TokenSource
from pretrain.audit.report import audit
from pretrain.comparison.config import make_plan
from pretrain.comparison.findings import find
from pretrain.comparison.plan_file import write_plan
from pretrain.comparison.report.files import summary
from pretrain.comparison.results import load_results
from pretrain.comparison.verdict import overall
from pretrain.metrics import read_rows
from slurm.monitor.status import status
from tests.e2e.warm import Run, train
from tests.pretrain.tiny_data import document, tiny_run, write_tiny_comparison, write_tokens
from tests.toml_text import toml_text

DOCUMENTS, DAMAGED = 160, 60
STEPS = 16
"""More than one pass over the documents: each was read."""
ALLOWED = "data.max_unreadable_frac=0.5"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    for name, count, seed in (("train", DOCUMENTS, 1), ("heldout", 20, 2)):
        rng = np.random.default_rng(seed)
        write_tokens(folder / name, [document(rng) for _ in range(count)])
    TokenSource.open(folder / "train")  # the index is made of what is there before the damage
    return folder


def damage(folder: Path) -> set[str]:
    """Flip a bit in each of DAMAGED documents; their names."""
    source = TokenSource.open(folder)
    chosen = np.random.default_rng(0).permutation(DOCUMENTS)[:DAMAGED].tolist()
    for number in chosen:
        path = folder / source.name(number).split("/")[0]
        content = bytearray(path.read_bytes())
        content[int(source.index.offset[number]) + 3] ^= 4
        path.write_bytes(content)
    return {f"{folder}/{source.name(number)}" for number in chosen}


def write_run(data: Path, folder: Path) -> Path:
    values = tiny_run(data, folder / "runs")
    values["total_tokens"] = STEPS * values["tokens_per_step"]
    values["every_steps"] |= {"log": 1, "checkpoint": 100}
    (folder / "tiny.toml").write_text(toml_text(values))
    return folder / "tiny.toml"


def of_data(run_dir: Path) -> list[dict[str, Any]]:
    rows = read_rows(run_dir / "metrics.jsonl")
    return [{name: value for name, value in row.items() if name.startswith("data/")} for row in rows]


def test_by_default_the_first_one_ends_the_run_on_all_ranks(data: Path, tmp_path: Path) -> None:
    names = damage(data / "train")
    run = Run([str(write_run(data, tmp_path))], tmp_path / "out", processes=2)
    assert run.codes() == [2, 2], run.text()
    assert "cannot be read as indexed (crc32)" in run.text()  # in one line, which may be cut short
    log = (tmp_path / "runs/tiny/logs/rank0.log").read_text()
    message = next(line for line in log.splitlines() if "cannot be read as indexed (crc32)" in line)
    named = message.removeprefix("motley train: ").partition(": ")[0].partition(" (and")[0].split(", ")
    assert set(named) <= names
    assert "data.max_unreadable_frac = 0 allows 0 of 160 documents" in message
    assert "goes on from the last checkpoint" in message and "Traceback" not in run.text()
    record = json.loads((tmp_path / "runs/tiny/record.json").read_text())
    assert record["status"] == "failed" and "cannot be read as indexed" in record["attempts"][-1]["reason"]


def test_what_is_allowed_is_counted_over_all_ranks_and_attempts(data: Path, tmp_path: Path) -> None:
    names = damage(data / "train")
    path, run_dir = write_run(data, tmp_path), tmp_path / "runs/tiny"
    train([str(path), ALLOWED, "name=whole"], tmp_path / "whole")
    run = Run([str(path), ALLOWED], tmp_path / "out", processes=2)
    run.wait_until(lambda: (run_dir / "metrics.jsonl").exists() and len(of_data(run_dir)) >= 3)
    run.signal(signal.SIGTERM)
    assert set(run.codes()) <= {85, 0}, run.text()
    if len(of_data(run_dir)) < STEPS:  # it was stopped before its end
        train([str(path), ALLOWED], tmp_path / "out")

    rows = of_data(run_dir)
    assert rows == of_data(tmp_path / "runs/whole")
    assert audit(run_dir), "the plan without these documents has the fingerprints of the rows"
    counts = [row["data/unreadable"] for row in rows]
    assert counts == sorted(counts) and 0 < counts[0] < counts[-1] == DAMAGED
    listed = [name for row in rows for name in row.get("data/unreadable_documents", ())]
    assert len(listed) == DAMAGED and set(listed) == names
    assert "step 16 of 16 is saved; 60 documents could not be read" in run.text().splitlines()[-1]
    assert "(60 of 160 documents so far)" in run.text()
    page = io.StringIO()
    assert status([run_dir], to=page) == 0
    assert "documents: 60 unreadable" in page.getvalue()


def test_a_comparison_whose_second_arm_read_damaged_data_is_not_decided(data: Path, tmp_path: Path) -> None:
    path = write_tiny_comparison(data, tmp_path, steps=STEPS)
    plan = make_plan(path, [ALLOWED, "comparison.seeds=[3]"])
    write_plan(plan)
    names: set[str] = set()
    for run in plan.runs:
        config = tmp_path / f"{run.name}.json"
        config.write_text(run.config.model_dump_json())
        train([str(config)], tmp_path / run.name)
        names = names or damage(data / "train")
    findings = find(plan, load_results(plan))
    same_data = summary(findings)["same_data"]
    assert not same_data["proven"] and set(same_data["unreadable"]["mot_seed3"]) == names
    (text,) = same_data["broken"]
    assert "mot alone could not read 60 documents" in text and any(name in text for name in names)
    assert overall(findings).endswith(
        "nothing is decided between mot and dense: they did not read the same data."
    )
