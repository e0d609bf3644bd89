import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from scipy.io import wavfile

from data_pipeline.files.lock import lock_directory
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.tar import ShardError, read_samples, write_shard
from data_pipeline.stream.stream import Stream
from data_pipeline.tokenize.claim import CLAIM_LOCK
from data_pipeline.tokenize.documents import DocumentEncoder
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.prepare import SETTINGS, read_source, tokenize, unfinished_parts
from data_pipeline.tokenize.raw import document_sample, parse_document
from data_pipeline.tokenize.ready_ids import import_tokens
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from tests.data_pipeline.raw_documents import CONFIG, SUFFIX, document, write_raw
from tests.warm_python import executable
from tools.cli import main

ROOT = Path(__file__).parents[3]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder that says something of the data."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (".lock", "codebook.npz")  # a zip: it holds the time
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/{train,heldout}, data.toml and out, tokenized by two processes."""
    folder = tmp_path_factory.mktemp("prepare")
    write_raw(folder / "raw" / "train")
    write_raw(folder / "raw" / "heldout", shards=1, first=100)
    (folder / "data.toml").write_text(CONFIG)
    tokenize(folder / "raw", folder / "out", config_path=folder / "data.toml", processes=2)
    return folder


@pytest.fixture
def reuse(data: Path, tmp_path: Path) -> Path:
    """A data.toml that takes the tokenizers that are fitted already."""
    path = tmp_path / "reuse.toml"
    path.write_text(f'tokenizers_from = "{data / "out" / "tokenizers"}"\nmax_bad_frac = 0.0\n')
    return path


def test_documents_come_out_as_they_went_in(data: Path) -> None:
    tokenizers = load_tokenizers(data / "out" / "tokenizers")
    for split, first in (("train", 0), ("heldout", 100)):
        source = TokenSource.open(data / "out" / split)
        for number in range(source.num_documents):
            expected = document(first + number)
            ids = source.read(number)
            parts = read_spans(ids, source.vocabulary)
            merged = [(part.modality, ids[part.start : part.end]) for part in parts]
            texts = [tokenizers["text"].decode(part) for kind, part in merged if kind == "text"]
            assert "".join(texts) == "".join(part.data for part in expected if part.modality == "text")
            kinds = [part.modality for part in expected]
            joined = [
                kind for i, kind in enumerate(kinds) if kind != "text" or i == 0 or kinds[i - 1] != "text"
            ]
            assert [kind for kind, _ in merged] == joined
            pixels = next(part for kind, part in merged if kind == "image")[1:-1]
            original = tokenizers["image"].read(next(p.data for p in expected if p.modality == "image"))
            decoded = tokenizers["image"].decode(pixels.astype(int) - source.vocabulary.start("image"))
            assert np.abs(decoded.astype(int) - original).max() == 0, "27 colours of patch, 32 codes"


def test_token_shards_are_webdataset_shards_of_raw_ids(data: Path) -> None:
    source = TokenSource.open(data / "out" / "train")
    shard = webdataset.WebDataset(str(data / "out" / "train" / "tokens-00001.tar"), shardshuffle=False)
    samples = list(shard)
    assert [sample["__key__"] for sample in samples] == [f"{i:04d}" for i in range(8)]
    assert np.frombuffer(samples[3]["ids"], source.vocabulary.dtype).tolist() == source.read(11).tolist()
    assert source.name(11) == "tokens-00001.tar/0003"


def test_the_manifest_says_what_is_there(data: Path) -> None:
    manifest = json.loads((data / "out" / "train" / "manifest.json").read_text())
    source = TokenSource.open(data / "out" / "train")
    tokenizers = load_tokenizers(data / "out" / "tokenizers")
    assert manifest["format"] == 1 and manifest["num_documents"] == 24
    assert manifest["vocabulary"] == {name: tokenizer.size for name, tokenizer in tokenizers.items()}
    assert {n: t["fingerprint"] for n, t in manifest["tokenizers"].items()} == {
        name: tokenizer.fingerprint for name, tokenizer in tokenizers.items()
    }
    counted = np.bincount(
        np.concatenate([source.vocabulary.modality_of(source.read(i)) for i in range(24)]), minlength=3
    )
    assert list(manifest["tokens"].values()) == counted.tolist()
    assert [shard["documents"] for shard in manifest["shards"]] == [8, 8, 8]
    assert manifest["num_skipped"] == 0 and manifest["skipped"] == []


def test_pictures_may_be_vectors(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = 'kind = "patches"\nsize_px = 16\npatch_px = 4\n'
    path = tmp_path / "data.toml"
    path.write_text(re.sub(r"(?s)(\[image\]\n).*?(\[speech\])", rf"\1{grid}\2", CONFIG))
    tokenize(data / "raw/heldout", tmp_path / "out", config_path=path, processes=1)
    source, tokenizers = TokenSource.open(tmp_path / "out"), load_tokenizers(tmp_path / "out/tokenizers")
    assert source.vocabulary.sizes["image"] == 1 and source.vocabulary.vectors["image"].features == 48
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["tokenizers"]["image"]["kind"] == "patches" and manifest["tokens"]["image"] == 8 * 16
    assert manifest["vectors"]["image"]["std"] == source.vocabulary.vectors["image"].std > 1
    pixels = []
    for number in range(source.num_documents):
        original = next(part.data for part in document(100 + number) if part.modality == "image")
        vectors = source.document(number).vectors["image"]
        pixels.append(tokenizers["image"].decode(vectors))
        assert (pixels[-1] == tokenizers["image"].read(original)).all()
    assert source.vocabulary.vectors["image"].mean == pytest.approx(np.stack(pixels).mean(), rel=1e-12)
    assert "decode(encode(x)) is x, to the bit, over 8 of 8 pictures" in capsys.readouterr().out
    plain, beside = (tmp_path / "plain.toml", tmp_path / "beside")
    plain.write_text(f'tokenizers_from = "{tmp_path / "out/tokenizers"}"\n')
    np.save(tmp_path / "ids.npy", np.full((2, 5), 60))
    import_tokens(tmp_path / "ids.npy", beside, config_path=plain, end=None)
    text = TokenSource.open(beside)
    assert text.vocabulary == source.vocabulary and text.document(0).vectors["image"].shape == (0, 48)
    Stream([(source, 1.0), (text, 1.0)], seed=1, context_tokens=256, sequences_per_step=1)


def test_the_round_trip_can_be_looked_at_and_heard(data: Path) -> None:
    with Image.open(data / "out" / "roundtrip.png") as page:
        assert page.size[0] > page.size[1] > 100
    rate_hz, samples = wavfile.read(data / "out" / "roundtrip.wav")
    assert rate_hz == 16_000 and np.abs(samples).max() > 1000


def test_any_number_of_processes_writes_the_same_bytes(data: Path, tmp_path: Path) -> None:
    tokenize(data / "raw", tmp_path / "out", config_path=data / "data.toml", processes=1)
    assert contents(tmp_path / "out") == contents(data / "out")


def test_parts_at_once_and_a_finish_write_the_same_bytes(
    data: Path, reuse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["tokenize", str(data / "raw"), str(out), "--config", str(reuse), "--processes", "1"]
    assert main([*words, "--part", "1/2"]) == 2
    assert "--tokenizers-only" in capsys.readouterr().err and not out.exists()
    assert main([*words, "--tokenizers-only"]) == 0
    assert not list(out.rglob("*.tar"))
    config, splits, _ = read_source(data / "raw", reuse)
    assert unfinished_parts(splits, out, config, 3) == [1, 2, 3]
    assert unfinished_parts(splits, out, config, 9) == [1, 2, 3, 4]

    # A part that ends before the others begin, then two in processes of their own at the same time.
    assert main([*words, "--part", "2/3"]) == 0
    # Of heldout's one shard and train's three: counted through both.
    assert [str(path.relative_to(out)) for path in out.rglob("*.tar")] == ["train/tokens-00000.tar"]
    assert unfinished_parts(splits, out, config, 3) == [1, 3]
    both = [
        subprocess.Popen([executable(), "-m", "tools.cli", *words, "--part", f"{k}/3"], cwd=ROOT)
        for k in (1, 3)
    ]
    assert [process.wait(120) for process in both] == [0, 0]
    assert unfinished_parts(splits, out, config, 3) == []
    shards = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert len(shards) == 4 and not list(out.rglob("manifest.json"))

    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == shards
    tokenize(data / "raw", tmp_path / "whole", config_path=reuse, processes=1)
    assert contents(out) == contents(tmp_path / "whole")
    assert unfinished_parts(splits, out, config, 3) == []
    assert main([*words, "--part", "2/3"]) == 0, "nothing left to do"
    assert not list(out.rglob(".records"))


def test_parts_are_written_as_k_of_n(data: Path, tmp_path: Path) -> None:
    for text in ("0/3", "4/3", "2", "a/b", "-1/3"):
        with pytest.raises(SystemExit):
            main(["tokenize", str(data / "raw"), str(tmp_path / "new"), "--config", "c", f"--part={text}"])


def test_a_second_run_changes_nothing(data: Path) -> None:
    before = contents(data / "out")
    stamps = [path.stat().st_mtime_ns for path in (data / "out" / "train").glob("*.tar")]
    tokenize(data / "raw", data / "out", config_path=data / "data.toml", processes=1)
    assert contents(data / "out") == before
    assert [path.stat().st_mtime_ns for path in (data / "out" / "train").glob("*.tar")] == stamps


def test_killed_at_any_moment_it_goes_on_and_ends_with_the_same_bytes(reuse: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw", shards=6, documents=60)
    tokenize(tmp_path / "raw", tmp_path / "whole", config_path=reuse, processes=2)
    out = tmp_path / "out"
    kills = 0
    while kills < 2:
        command = [sys.executable, "-m", "tools.cli", "tokenize", tmp_path / "raw", out, "--config", reuse]
        run = subprocess.Popen([*map(str, command), "--processes", "2"], cwd=ROOT, stderr=subprocess.DEVNULL)
        finished = len(list(out.glob("tokens-*.tar")))
        while run.poll() is None and len(list(out.glob("tokens-*.tar"))) < finished + 2:
            time.sleep(0.002)
        assert run.poll() is None, "it ended before it could be killed"
        run.kill()
        run.wait()
        kills += 1
        for path in out.glob("tokens-*.tar"):
            assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes(), "half-written"
    assert not (out / "manifest.json").exists()
    tokenize(tmp_path / "raw", out, config_path=reuse, processes=2)
    assert contents(out) == contents(tmp_path / "whole")


def bad_samples(folder: Path) -> Path:
    """One shard of ten samples, of which four are bad, each in a way of its own."""
    good = [(f"{i:04d}", document_sample(document(i), SUFFIX)) for i in range(10)]
    good[2][1]["json"] = b'{"parts": '
    good[4][1]["0.png"] = good[4][1]["0.png"][:-40]
    good[5][1]["0.wav"] = good[5][1]["0.wav"][:-40]
    del good[7][1]["0.png"]
    folder.mkdir()
    write_shard(folder / "raw-00000.tar", good)
    return folder


def test_bad_samples_are_named_counted_and_skipped(reuse: Path, tmp_path: Path) -> None:
    raw = bad_samples(tmp_path / "raw")
    with pytest.raises(ConfigError) as error:
        tokenize(raw, tmp_path / "out", config_path=reuse, processes=1)
    message = str(error.value)
    assert "4 of the 10 samples read so far cannot be used, more than max_bad_frac = 0.0" in message
    for key, reason in (
        ("0002", "not valid JSON"),
        ("0004", "picture"),
        ("0005", "wave"),
        ("0007", "missing"),
    ):
        assert any(f"raw-00000.tar {key}: " in line and reason in line for line in message.splitlines())
    written = (tmp_path / "out" / "tokens-00000.tar").stat().st_mtime_ns
    reuse.write_text(reuse.read_text().replace("max_bad_frac = 0.0", "max_bad_frac = 0.4"))
    manifest = tokenize(raw, tmp_path / "out", config_path=reuse, processes=1)[""]
    assert (tmp_path / "out" / "tokens-00000.tar").stat().st_mtime_ns == written, "what was done is kept"
    assert manifest["num_documents"] == 6 and manifest["num_skipped"] == 4
    assert [skip["key"] for skip in manifest["skipped"]] == ["0002", "0004", "0005", "0007"]
    source = TokenSource.open(tmp_path / "out")
    assert [source.name(i)[-4:] for i in range(6)] == ["0000", "0001", "0003", "0006", "0008", "0009"]


def test_keys_that_repeat_or_do_not_fit_are_bad_samples(reuse: Path, tmp_path: Path) -> None:
    sample = document_sample(document(1), SUFFIX)
    (tmp_path / "raw").mkdir()
    write_shard(tmp_path / "raw" / "a.tar", [("x", sample), ("y", sample), ("x", sample)])
    with pytest.raises(ConfigError, match=r"a\.tar x: its key was there before"):
        tokenize(tmp_path / "raw", tmp_path / "out", config_path=reuse, processes=1)


def test_a_truncated_raw_shard_is_named_and_the_others_are_kept(reuse: Path, tmp_path: Path) -> None:
    write_raw(tmp_path / "raw")
    whole = (tmp_path / "raw" / "raw-00002.tar").read_bytes()
    (tmp_path / "raw" / "raw-00002.tar").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ShardError, match=r'raw-00002\.tar: truncated or damaged near sample "000'):
        tokenize(tmp_path / "raw", tmp_path / "out", config_path=reuse, processes=1)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar*")) == [
        "tokens-00000.tar",
        "tokens-00001.tar",
    ]


def test_raw_shards_are_joined_when_asked(reuse: Path, tmp_path: Path) -> None:
    samples = [(f"{i:04d}", document_sample(document(i), SUFFIX)) for i in range(9)]
    (tmp_path / "raw").mkdir()
    for number in range(3):
        write_shard(tmp_path / "raw" / f"{number}.tar", samples[3 * number : 3 * number + 3])
    reuse.write_text(reuse.read_text() + "raw_shards_per_shard = 2\n")
    manifest = tokenize(tmp_path / "raw", tmp_path / "out", config_path=reuse, processes=2)[""]
    assert [shard["documents"] for shard in manifest["shards"]] == [6, 3]
    encoder = DocumentEncoder(load_tokenizers(tmp_path / "out" / "tokenizers"), Limits())
    source = TokenSource.open(tmp_path / "out")
    for number, (_, sample) in enumerate(samples):
        assert source.read(number).tolist() == encoder.encode(sample).ids.tolist()


def test_a_remote_source_gives_the_same_shards_and_its_command_is_said(
    data: Path, reuse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = f"cat {shlex.quote(str(data))}/raw/train/raw-"
    pattern = f"pipe:{command}{{00000..00002}}.tar"
    assert main(["tokenize", pattern, str(tmp_path / "out"), "--config", str(reuse), "--processes", "1"]) == 0
    said = f"SRC is a command, which is run to read a shard: {command}00000.tar, and 2 like it"
    assert said in capsys.readouterr().err
    for path in (data / "out" / "train").glob("tokens-*.tar"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_a_decoder_that_dies_costs_one_sample_also_while_tokenizers_are_fitted(tmp_path: Path) -> None:
    faults = {"01": b"crash", "04": b"exit", "05": b"hang", "08": b"error"}
    contents = {f"{number:02}": faults.get(f"{number:02}", b"good") for number in range(10)}
    parts = b'{"parts": [{"text": "the red three"}, {"fault": "bin"}]}'
    (tmp_path / "raw").mkdir()
    write_shard(
        tmp_path / "raw" / "a.tar", [(key, {"json": parts, "bin": data}) for key, data in contents.items()]
    )
    config = tmp_path / "data.toml"
    kind = "tests.data_pipeline.deadly_tokenizer"
    config.write_text(
        f'max_bad_frac = 0.4\n[text]\n[fault]\nkind = "{kind}"\n[limits]\nsample_timeout_s = 0.7\n'
    )
    manifest = tokenize(tmp_path / "raw", tmp_path / "out", config_path=config, processes=2)[""]
    reasons = {skip["key"]: skip["reason"] for skip in manifest["skipped"]}
    assert manifest["num_documents"] == 6 and reasons.keys() == faults.keys()
    assert reasons["01"] == "its decoder crashed (SIGSEGV)" and reasons["04"] == "its decoder exited with 3"
    assert reasons["05"] == "its decoder took longer than limits.sample_timeout_s = 0.7"
    assert reasons["08"].startswith("KeyError in deadly_tokenizer.py:")


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["tokenize", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_mistakes_of_a_user(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, config, out = data / "raw", data / "data.toml", data / "out"
    new = tmp_path / "new"

    def config_of(text: str) -> Path:
        (tmp_path / "other.toml").write_text(text)
        return tmp_path / "other.toml"

    (tmp_path / "empty").mkdir()
    assert "it holds nothing" in mistake(capsys, tmp_path / "empty", new, "--config", config)
    assert "no such folder" in mistake(capsys, tmp_path / "typo", new, "--config", config)
    assert "no such file" in mistake(capsys, raw, new, "--config", tmp_path / "typo.toml")
    assert 'did you mean "num_codes"?' in mistake(
        capsys, raw, new, "--config", config_of(CONFIG.replace("num_codes", "num_code"))
    )
    assert "not valid TOML" in mistake(capsys, raw, new, "--config", config_of("[text\n"))
    assert "at least 1" in mistake(capsys, raw, new, "--config", config, "--processes", 0)
    assert "is not empty and holds no token shards" in mistake(capsys, raw, raw, "--config", config)
    assert "cannot be written" in mistake(capsys, raw, config / "out", "--config", config)
    changed = mistake(
        capsys, raw, out, "--config", config_of(CONFIG.replace("num_codes = 32", "num_codes = 64"))
    )
    assert "config.image.num_codes: there 32, now 64" in changed
    other_source = mistake(capsys, raw / "train", out, "--config", config)
    assert "source.train: there" in other_source
    assert "[text] is needed" in mistake(capsys, raw, new, "--config", config_of("[image]\n"))


def test_wrong_contents_are_explained(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = data / "data.toml"
    (tmp_path / "pairs").mkdir()
    write_shard(tmp_path / "pairs" / "a.tar", [("1", {"jpg": b"...", "txt": b"a cat"})])
    message = mistake(capsys, tmp_path / "pairs", tmp_path / "out1", "--config", config)
    assert "no .json member, only ['jpg', 'txt']" in message
    (tmp_path / "texts").mkdir()
    write_shard(tmp_path / "texts" / "a.tar", [("1", {"json": b'{"parts": [{"text": "a"}]}'})])
    message = mistake(capsys, tmp_path / "texts", tmp_path / "out2", "--config", config)
    assert "no speech to fit" in message or "no image to fit" in message
    assert "remove the table" in message
    (tmp_path / "text.toml").write_text("[text]\nvocab_size = 512\n")
    message = mistake(capsys, data / "raw", tmp_path / "out3", "--config", tmp_path / "text.toml")
    assert "there is no tokenizer: add [" in message


def test_another_job_at_the_same_output_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_directory(data / "out", str, name=CLAIM_LOCK):
        message = mistake(capsys, data / "raw", data / "out", "--config", data / "data.toml")
    assert f"pid {os.getpid()}" in message and "is writing it" in message


def test_a_shard_that_went_missing_is_noticed(data: Path, reuse: Path, tmp_path: Path) -> None:
    tokenize(data / "raw" / "heldout", tmp_path / "out", config_path=reuse, processes=1)
    assert (tmp_path / "out" / SETTINGS).exists()
    (tmp_path / "out" / "tokens-00000.tar").unlink()
    with pytest.raises(ShardError, match=r"tokens-00000\.tar: missing"):
        tokenize(data / "raw" / "heldout", tmp_path / "out", config_path=reuse, processes=1)


def test_raw_documents_are_read_as_they_were_written(data: Path) -> None:
    read = list(read_samples(data / "raw" / "train" / "raw-00001.tar"))
    assert [parse_document(sample) for _, sample in read] == [document(8 + i) for i in range(8)]
