"""Hostile files of every kind end as a good sample, a refused sample that is named, or one clear error."""

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.printable import hidden_characters
from data_pipeline.files.toml_config import ConfigError, load_toml
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import ShardError, read_samples, write_shard
from data_pipeline.tokenize.config import load_tokenize_config
from data_pipeline.tokenize.documents import DocumentEncoder
from data_pipeline.tokenize.kinds.bpe import BpeConfig, fit_bpe
from data_pipeline.tokenize.kinds.log_mel_kmeans import UnitConfig, fit_units
from data_pipeline.tokenize.kinds.patch_kmeans import PatchConfig, PatchTokenizer
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.registry import save_tokenizer
from data_pipeline.tokenize.tokenizer import Tokenizer
from tests.data_pipeline.hostile_files import GOOD_PNG, GOOD_WAV, NAMES, hostile_files, member, tar_of
from tests.data_pipeline.raw_documents import WORDS, tone
from tools.cli import main

LIMITS = Limits(picture_mpx=1, wave_s=10, sample_mib=1)
FILES = hostile_files(seed=14)
SAMPLE_KINDS = ("wave", "picture", "document", "text")
GOOD_JSON = b'{"parts": [{"text": "the red three"}]}'


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    codebook = np.random.default_rng(0).integers(0, 256, (8, 48), np.uint8)
    return {
        "text": fit_bpe([" ".join(WORDS)] * 20, BpeConfig(vocab_size=512)),
        "image": PatchTokenizer(PatchConfig(size_px=16, num_codes=8, num_verbatim=0), codebook),
        "speech": fit_units([tone(1).astype(np.float32) / 2**15], UnitConfig(num_units=4), 0),
    }


def sample_of(kind: str, content: bytes) -> dict[str, bytes]:
    """A sample with a hostile file in its place."""
    if kind in ("document", "text"):
        return {"json": content, "0.png": GOOD_PNG}
    modality, name = ("speech", "0.wav") if kind == "wave" else ("image", "0.png")
    return {"json": json.dumps({"parts": [{modality: name}]}).encode(), name: content}


def outcome(encode: Callable[[], object]) -> str:
    """ "good" or the kind of the error, whose message is one that a terminal may show."""
    try:
        encode()
    except (SampleError, ShardError, ConfigError) as error:
        assert str(error) and hidden_characters(str(error)).strip("\n") == ""
        assert len(str(error)) < 2000
        return type(error).__name__
    return "good"


def test_there_are_many_files_of_all_kinds_and_a_seed_makes_the_same() -> None:
    assert sum(map(len, FILES.values())) >= 200 and all(len(files) >= 15 for files in FILES.values())
    assert hostile_files(seed=14) == FILES


@pytest.mark.parametrize("kind", SAMPLE_KINDS)
def test_hostile_samples_are_good_or_refused_by_name(kind: str, tokenizers: dict[str, Tokenizer]) -> None:
    encoder = DocumentEncoder(tokenizers, LIMITS)
    found = Counter(
        outcome(lambda content=content: encoder.encode(sample_of(kind, content))) for content in FILES[kind]
    )
    assert set(found) == {"good", "SampleError"}, found
    assert encoder.encode(sample_of("picture", GOOD_PNG)).tokens["image"] == 16
    assert encoder.encode(sample_of("wave", GOOD_WAV)).tokens["speech"] > 0


def test_hostile_tars_are_read_or_refused_and_write_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    found: Counter[str] = Counter()
    for content in FILES["tar"]:
        path.write_bytes(content)
        found[outcome(lambda: list(read_samples(path, max_sample_bytes=LIMITS.sample_bytes)))] += 1
    assert set(found) == {"good", "ShardError"}, found
    assert list(tmp_path.iterdir()) == [path]


def test_hostile_tables_are_one_message(tmp_path: Path) -> None:
    path = tmp_path / "data.toml"
    found: Counter[str] = Counter()
    for content in FILES["table"]:
        path.write_bytes(content)
        found[outcome(lambda: load_tokenize_config(path))] += 1
    assert set(found) == {"good", "ConfigError"}, found


def test_places_that_are_no_configs_are_one_message(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to("loop.toml")
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "deep.json").write_text("[" * 5000)
    for name, why in (
        ("loop.toml", "cannot be read"),
        ("folder.toml", "cannot be read"),
        ("deep.json", "JSON"),
    ):
        with pytest.raises(ConfigError, match=rf"{name}: .*{why}"):
            load_toml(tmp_path / name)
    for name in ("pipe.tar", "folder.tar"):
        with pytest.raises(ShardError, match="not a regular file"):
            path = tmp_path / name
            os.mkfifo(path) if name == "pipe.tar" else path.mkdir()
            list(read_samples(path))


def test_all_of_it_goes_through_tokenize(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for modality, tokenizer in tokenizers.items():
        kind = {"text": "bpe", "image": "patch_kmeans", "speech": "log_mel_kmeans"}[modality]
        save_tokenizer(tmp_path / "tokenizers" / modality, modality, kind, tokenizer)
    hostile = [(kind, content) for kind in SAMPLE_KINDS for content in FILES[kind]]
    samples = [(f"{number:04}", sample_of(kind, content)) for number, (kind, content) in enumerate(hostile)]
    (tmp_path / "raw").mkdir()
    write_shard(tmp_path / "raw" / "a.tar", samples)
    named = [member(f"{name}.json", GOOD_JSON) for name in NAMES]
    (tmp_path / "raw" / "b.tar").write_bytes(tar_of([*named, member("large.bin", bytes(1 << 21))]))
    config = tmp_path / "data.toml"
    settings = f'tokenizers_from = "{tmp_path}/tokenizers"\nraw_shards_per_shard = 2\n'
    limits = "[limits]\npicture_mpx = 1\nwave_s = 10\nsample_mib = 1\n"
    config.write_text(f"{settings}max_bad_frac = 1.0\n{limits}")
    before = {path for path in tmp_path.rglob("*")}

    words = ["tokenize", str(tmp_path / "raw"), str(tmp_path / "out"), "--config", str(config)]
    assert main([*words, "--processes", "1"]) == 0
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["num_documents"] + manifest["num_skipped"] == len(samples) + len(NAMES) + 1
    assert all(skip["key"] and skip["reason"] for skip in manifest["skipped"])
    assert len([skip for skip in manifest["skipped"] if skip["shard"].endswith("b.tar")]) == len(NAMES) + 1
    source = TokenSource.open(tmp_path / "out")
    assert all(len(source.read(number)) > 2 for number in range(source.num_documents))
    created = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "out") for path in created)

    config.write_text(f"{settings}max_bad_frac = 0.01\n{limits}")
    assert main([*words[:2], str(tmp_path / "strict"), *words[3:], "--processes", "1"]) == 2
    printed = capsys.readouterr()
    assert "samples read so far cannot be used, more than max_bad_frac = 0.01 allows" in printed.err
    assert hidden_characters(printed.out + printed.err).strip("\n\r") == "" and "Traceback" not in printed.err


def test_a_forged_name_is_shown_escaped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.toml").write_text('"a\\nmotley: all is well\\u001b[2J" = 1\n[text]\n')
    (tmp_path / "raw").mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a"))
    words = [
        "tokenize",
        str(tmp_path / "raw"),
        str(tmp_path / "out"),
        "--config",
        str(tmp_path / "data.toml"),
    ]
    assert main(words) == 2
    assert r"a\nmotley: all is well\x1b[2J: unknown key" in capsys.readouterr().err
    (tmp_path / "data.toml").write_text("[text]\n")
    for name in ("a\nb.tar", "a\x1b[2J.tar"):
        path = tmp_path / "raw" / name
        path.write_bytes(buffer.getvalue())
        assert main(words) == 2
        assert "not the name of a file in this folder" in (said := capsys.readouterr().err)
        assert hidden_characters(said) == "\n" and said.count("\n") == 1
        path.unlink()
    (tmp_path / "raw" / "a\nb").mkdir()
    (tmp_path / "raw" / "a\nb" / "a.tar").write_bytes(buffer.getvalue())
    assert main(words) == 2
    assert capsys.readouterr().err.count("\n") == 1
