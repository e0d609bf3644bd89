"""Each document as often as planned, and in which step: against a count over what ranks read."""

import csv
from collections import Counter
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.loader import Loader
from pretrain.audit.report import audit, compare
from pretrain.audit.steps import open_run
from tests.pretrain.audit.consumed_run import read_run, write_masked_data
from tools.cli import main

STEPS = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write_masked_data(folder)
    read_run(folder, folder / "runs", steps=STEPS, name="one")
    read_run(folder, folder / "runs", steps=STEPS, name="other", seed=4)
    read_run(folder, folder / "runs", steps=STEPS - 2, name="shorter", dp_size=1)
    return folder


def met_by_ranks(folder: Path) -> Counter[tuple[int, str]]:
    """(step, document) -> pieces of it, as a loader names them."""
    run = open_run(folder)
    found: Counter[tuple[int, str]] = Counter()
    with Loader(run.stream, dp_rank=0, dp_size=1, micro_batch_sequences=4, prefetch_steps=0) as loader:
        for step in range(1, STEPS + 1):
            for batch in loader.next_step().micro_batches:
                found.update((step, name) for names in batch.samples for name in names)
    return found


def test_every_reading_of_a_document_is_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert audit(folder / "runs/one", documents=folder / "read.csv")
    with (folder / "read.csv").open() as file:
        lines = list(csv.DictReader(file))
    met = met_by_ranks(folder / "runs/one")
    assert Counter((int(line["step"]), line["document"]) for line in lines) == met
    printed = capsys.readouterr().out
    assert "the fingerprints of all 4 rows agree" in printed and f"{STEPS} steps of 4 sequences" in printed
    source, slots = TokenSource.open(folder / "train"), Counter[str]()
    for line in lines:
        slots[line["document"]] += int(line["slots"])
    lengths = {source.name(number): int(source.lengths[number]) - 1 for number in range(90)}
    times = Counter(slots[name] // length for name, length in lengths.items())
    words = {0: "never", 1: "once", 2: "twice"}
    assert all(f"{words.get(n, f'{n} times')}: {count}" in printed for n, count in times.items()), printed


def test_the_steps_of_a_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, step = next((name, step) for step, name in met_by_ranks(folder / "runs/one"))
    assert main(["audit", str(folder / "runs/one"), "--document", name]) == 0
    assert f"{name}: step {step}, sequence " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="no such document; legal: SHARD/KEY"):
        audit(folder / "runs/one", name="tokens-00000.tar/nope")


def test_two_runs_are_compared(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other, shorter = (folder / "runs" / name for name in ("one", "other", "shorter"))
    assert compare(one, one) and main(["audit", str(one), str(one)]) == 0
    assert not compare(one, shorter), "on another number of ranks the first six steps are equal"
    assert (
        f"the first {STEPS - 2} steps consumed the same; {one} went on to step {STEPS}"
        in capsys.readouterr().out
    )
    assert main(["audit", str(one), str(other)]) == 1
    printed = capsys.readouterr().out
    assert "step 1 differs" in printed and "90 documents consumed by both" in printed
    assert main(["audit", str(one), str(other), "--document", "x/y"]) == 2
