"""A modality that the project does not know, added by a table and a tokenizer file: raw files to losses."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.tar import write_shard
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream
from data_pipeline.tokenize.prepare import tokenize
from data_pipeline.tokenize.raw import Part, document_sample
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from tests.data_pipeline.raw_documents import CONFIG, SUFFIX, document
from tests.e2e.warm import train
from tests.toml_text import toml_text

MODALITIES = ("text", "image", "speech", "video")
CONTEXT_TOKENS = 128
VIDEO_TABLE = """
[video]
kind = "tests.data_pipeline.video_tokenizer"
num_codes = 6
"""


def clip(seed: int) -> np.ndarray:
    """uint8 [frames, 4, 4]; frames become brighter, so that a code tells about the next one."""
    frames = 4 + seed % 5
    return np.repeat((20 * np.arange(frames) + 10 * (seed % 7)).astype(np.uint8), 16).reshape(frames, 4, 4)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def samples(first: int, count: int) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Documents of the usual parts with a clip among them; every fourth is a clip alone."""
    for seed in range(first, first + count):
        parts = [Part("video", npy(clip(seed))), *([] if seed % 4 == 3 else document(seed))]
        Random(seed).shuffle(parts)
        yield f"{seed:04d}", document_sample(parts, {**SUFFIX, "video": "npy"})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw shards, data.toml, and out: tokenized in worker processes."""
    folder = tmp_path_factory.mktemp("video")
    for split, first, count in (("train", 0, 48), ("heldout", 100, 16)):
        (folder / "raw" / split).mkdir(parents=True)
        write_shard(folder / "raw" / split / "raw-00000.tar", samples(first, count))
    (folder / "data.toml").write_text(CONFIG + VIDEO_TABLE)
    tokenize(folder / "raw", folder / "out", config_path=folder / "data.toml", processes=2)
    return folder


def test_clips_come_out_as_they_went_in(data: Path) -> None:
    tokenizers = load_tokenizers(data / "out" / "tokenizers")
    source = TokenSource.open(data / "out" / "train")
    vocabulary = source.vocabulary
    assert vocabulary.modalities == tuple(tokenizers) == MODALITIES
    assert vocabulary.sizes["video"] == tokenizers["video"].size + 2
    assert vocabulary.delimiters("image") == (3, 4) and vocabulary.delimiters("speech") == (5, 6)
    entry = source.manifest["tokenizers"]["video"]
    assert entry["kind"] == "tests.data_pipeline.video_tokenizer" and entry["settings"] == {"num_codes": 6}
    assert "kind" not in source.manifest["tokenizers"]["image"]
    opening, closing = vocabulary.delimiters("video")
    for number in range(source.num_documents):
        ids = source.read(number).astype(int)
        (span,) = (span for span in read_spans(ids, vocabulary) if span.modality == "video")
        assert (ids[span.start], ids[span.end - 1]) == (opening, closing)
        codes = ids[span.start + 1 : span.end - 1] - vocabulary.first_code("video")
        assert codes.tolist() == tokenizers["video"].encode(clip(number)).tolist()


def test_ids_of_the_other_modalities_are_those_of_data_without_it(data: Path, tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    usual = ((f"{seed:04d}", document_sample(document(seed), SUFFIX)) for seed in (0, 1, 2))
    write_shard(tmp_path / "raw" / "raw-00000.tar", usual)
    written = {}
    for name, modalities in (("three", MODALITIES[:3]), ("four", MODALITIES)):
        folder = tmp_path / name / "tokenizers"
        for modality in modalities:
            (folder / modality).mkdir(parents=True)
            for file in (data / "out" / "tokenizers" / modality).iterdir():
                (folder / modality / file.name).write_bytes(file.read_bytes())
        config = tmp_path / f"{name}.toml"
        config.write_text(f'tokenizers_from = "{folder}"\n')
        tokenize(tmp_path / "raw", tmp_path / name / "out", config_path=config, processes=1)
        written[name] = (tmp_path / name / "out" / "tokens-00000.tar").read_bytes()
    assert written["three"] == written["four"]


def test_the_stream_packs_clips_whole(data: Path) -> None:
    source = TokenSource.open(data / "out" / "train")
    stream = Stream([(source, 1.0)], seed=1, context_tokens=CONTEXT_TOKENS, sequences_per_step=4)
    opening, closing = source.vocabulary.delimiters("video")
    with Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=4, state=stream.start()) as loader:
        (batch,) = loader.next_step().micro_batches
    inputs = batch.input_ids
    assert (inputs == opening).sum() == (inputs == closing).sum() > 4
    assert batch.input_special[(inputs == opening) | (inputs == closing)].all()
    assert (batch.input_modality[inputs == opening] == 0).all(), "delimiters are text"
    assert (batch.input_modality == 3).any()


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.full), 2])
def test_a_mixture_of_four_transformers_trains_on_it(data: Path, tmp_path: Path, processes: int) -> None:
    vocabulary = TokenSource.open(data / "out" / "train").vocabulary
    run = {
        "name": "four",
        "seed": 3,
        "total_tokens": 6 * 4 * CONTEXT_TOKENS,
        "tokens_per_step": 4 * CONTEXT_TOKENS,
        "runs_dir": str(tmp_path / "runs"),
        "model": {
            "num_layers": 1,
            "d_model": 32,
            "num_heads": 2,
            "ffn_hidden": 64,
            "context_tokens": CONTEXT_TOKENS,
            "vocab_tokens": vocabulary.size,
            "towers": {name: name for name in MODALITIES},
            "depth": {"text": {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"}},
        },
        "data": {
            "train": [{"path": str(data / "out" / "train")}],
            "heldout": str(data / "out" / "heldout"),
        },
        "optimizer": {"learning_rate": 3e-3, "schedule": {"warmup_steps": 2}},
        "parallel": {"micro_batch_sequences": 2},
        "every_steps": {"log": 1, "eval": 3, "checkpoint": 6},
        "evaluate": {"heldout_sequences": 4, "conditional_documents": 4},
    }
    (tmp_path / "four.toml").write_text(toml_text(run))
    train([str(tmp_path / "four.toml")], tmp_path / "out", processes=processes)
    rows = [
        json.loads(line) for line in (tmp_path / "runs" / "four" / "metrics.jsonl").read_text().splitlines()
    ]
    losses = [row["train/loss/video"] for row in rows if "train/loss/video" in row]
    assert len(losses) == 6 and np.isfinite(losses).all() and losses[-1] < losses[0]
    evaluated = [row for row in rows if "eval/loss" in row]
    assert len(evaluated) >= 2
    for modality in MODALITIES[:3]:
        assert np.isfinite(evaluated[-1][f"eval/loss/{modality}_to_video"])
        assert np.isfinite(evaluated[-1][f"eval/loss/video_to_{modality}"])
    assert np.isfinite(evaluated[-1]["eval/loss/video"])
