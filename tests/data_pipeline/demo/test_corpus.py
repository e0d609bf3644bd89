import json
from pathlib import Path

import pytest

from data_pipeline.demo.corpus import (
    PART_SETS,
    RECORD,
    corpus_record,
    plan_shards,
    write_demo_corpus,
    write_task,
)
from data_pipeline.shards.tar import read_samples
from data_pipeline.tokenize.media.pictures import read_picture
from data_pipeline.tokenize.media.waves import RATE_HZ, read_wave
from data_pipeline.tokenize.raw import parse_document
from data_pipeline.tokenize.workers import run_tasks
from tools.cli import main

DOCUMENTS = 600
"""More than one training shard."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("corpus")
    write_demo_corpus(out, num_documents=DOCUMENTS, seed=3, processes=2)
    return out


def shards(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def test_documents_have_the_parts_they_should(corpus: Path) -> None:
    kinds: dict[tuple[str, ...], int] = {}
    orders = set()
    for split, count in (("train", 570), ("heldout", 30)):
        samples = [pair for path in sorted((corpus / split).glob("*.tar")) for pair in read_samples(path)]
        assert [key for key, _ in samples] == [f"{i:08d}" for i in range(count)]
        for _, sample in samples:
            parts = parse_document(sample)
            found = tuple(part.modality for part in parts)
            orders.add(found)
            kinds[tuple(sorted(found))] = kinds.get(tuple(sorted(found)), 0) + 1
            for part in parts:
                if part.modality == "image":
                    assert read_picture(part.data).shape == (32, 32, 3)
                elif part.modality == "speech":
                    assert 0.2 < len(read_wave(part.data)) / RATE_HZ < 6
                else:
                    assert part.data.strip()
    assert kinds.keys() == {("text",), *(tuple(sorted(kind)) for kind in PART_SETS)}
    assert kinds[("text",)] == 0.2 * DOCUMENTS
    assert len(orders) == 1 + 6 + 2 * 3, "every order of the parts occurs, so every direction is trained"


def test_any_number_of_processes_and_any_interruption_give_the_same_bytes(
    corpus: Path, tmp_path: Path
) -> None:
    once = shards(corpus)
    (task, *_) = plan_shards(tmp_path, DOCUMENTS, seed=3)
    task.path.parent.mkdir()
    with run_tasks(write_task, [task], 1, fresh_process_per_task=True) as counts:
        assert list(counts) == [500]
    assert task.path.read_bytes() == once["train/train-00000.tar"], "a shard depends on no other"
    (tmp_path / RECORD).write_text(json.dumps(corpus_record(DOCUMENTS, 3)))
    (tmp_path / "train" / "train-00001.tar.tmp").write_bytes(b"what a killed process left")
    stamp = task.path.stat().st_mtime_ns
    write_demo_corpus(tmp_path, num_documents=DOCUMENTS, seed=3, processes=1)
    assert shards(tmp_path) == once
    assert task.path.stat().st_mtime_ns == stamp, "what is finished is kept"
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_seed_is_another_corpus(corpus: Path, tmp_path: Path) -> None:
    write_demo_corpus(tmp_path, num_documents=40, seed=4, processes=2)
    assert not set(shards(tmp_path).values()) & set(shards(corpus).values())
    texts = [
        {
            part.data
            for path in (folder / "train").glob("*.tar")
            for _, sample in read_samples(path)
            for part in parse_document(sample)
            if part.modality == "speech"
        }
        for folder in (corpus, tmp_path)
    ]
    assert not texts[0] & texts[1]


def test_library_text_of_the_splits_is_disjoint(tmp_path: Path) -> None:
    placed = {"train": set(), "heldout": set()}
    for task in plan_shards(tmp_path, 30_000, seed=1):
        assert not placed[task.split] & set(task.passages.values()), "no passage twice"
        placed[task.split] |= set(task.passages.values())
    assert not placed["train"] & placed["heldout"]
    assert len(placed["train"]) > 1000 and len(placed["heldout"]) > 100


def test_mistakes_of_a_user(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def mistake(*arguments: object) -> str:
        assert main(["demo-corpus", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    assert "at least 20" in mistake(tmp_path, "--documents", 3)
    assert "seed: there 3, now 1" in mistake(corpus, "--documents", DOCUMENTS)
    (tmp_path / "thesis.tex").touch()
    assert "is not empty and holds no demo corpus" in mistake(tmp_path)
    assert "cannot be written" in mistake(tmp_path / "thesis.tex" / "out")
