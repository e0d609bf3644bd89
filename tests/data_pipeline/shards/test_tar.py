import json
import shlex
from pathlib import Path

import pytest
import webdataset
from webdataset.tariterators import base_plus_ext

from data_pipeline.shards.tar import (
    ShardError,
    Url,
    fits_a_tar,
    read_manifest,
    read_samples,
    split_name,
    typed_location,
    write_shard,
)

SAMPLES = [(f"{i:03d}", {"json": b"x" * (i * 211 % 700), "0.wav": bytes(1500)}) for i in range(4)]


def test_what_is_written_is_read_here_and_by_webdataset(tmp_path: Path) -> None:
    entry = write_shard(tmp_path / "a.tar", SAMPLES)
    assert list(read_samples(tmp_path / "a.tar")) == SAMPLES
    read = webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False)
    theirs = [(s["__key__"], {k: v for k, v in s.items() if not k.startswith("__")}) for s in read]
    assert theirs == SAMPLES
    assert entry["name"] == "a.tar" and entry["documents"] == 4
    assert entry["bytes"] == (tmp_path / "a.tar").stat().st_size


def test_shards_of_webdataset_are_read(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for key, sample in SAMPLES:
            writer.write({"__key__": f"some/folder/{key}", **sample})
    read = dict(read_samples(tmp_path / "a.tar"))
    assert read == {f"some/folder/{key}": sample for key, sample in SAMPLES}


def test_the_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = (write_shard(tmp_path / name, SAMPLES) for name in ("a.tar", "b.tar"))
    assert first["sha256"] == second["sha256"]
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


@pytest.mark.parametrize("name", ["a.txt", "a/b.c/0001.0.png", "v1.5_a.txt", ".hidden/7.json"])
def test_names_split_as_webdataset_splits_them(name: str) -> None:
    assert split_name(name) == base_plus_ext(name)


def test_a_cut_anywhere_is_an_error_or_loses_nothing(tmp_path: Path) -> None:
    """tarfile alone stops without a word at a cut between two files."""
    write_shard(tmp_path / "a.tar", SAMPLES)
    whole = (tmp_path / "a.tar").read_bytes()
    end = whole.rstrip(b"\0")
    harmless = []
    for cut in range(0, len(whole), 128):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        try:
            assert list(read_samples(tmp_path / "cut.tar")) == SAMPLES
            harmless.append(cut)
        except ShardError as error:
            assert "cut.tar" in str(error) and "truncated" in str(error)
    assert harmless and min(harmless) > len(end), "a cut into the files themselves went unnoticed"


def test_a_damaged_header_in_the_middle_is_an_error(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    content = bytearray((tmp_path / "a.tar").read_bytes())
    content[content.index(b"002.json") + 1] ^= 1
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r'a\.tar: truncated or damaged near sample "001"'):
        list(read_samples(tmp_path / "a.tar"))


@pytest.mark.parametrize("content", [b"", b"this is no tar at all " * 100])
def test_what_is_no_tar_is_said(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(ShardError, match=r"a\.tar: truncated or damaged before its first sample"):
        list(read_samples(tmp_path / "a.tar"))


def test_a_missing_shard_is_said(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"cannot be read: .*No such file"):
        list(read_samples(tmp_path / "a.tar"))


def test_urls_are_opened_by_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", SAMPLES)
    for typed in (f"pipe:cat {shlex.quote(str(tmp_path))}/a.tar", f"file://{tmp_path}/a.tar"):
        assert list(read_samples(typed_location(typed))) == SAMPLES
    for typed in ("https://host/a.tar", "pipe:aws s3 cp s3://b/a.tar -"):
        assert typed_location(typed) == Url(typed)
    assert typed_location("/data/a:b.tar") == Path("/data/a:b.tar")
    assert typed_location("file:///data/a.tar") == Path("/data/a.tar")


def test_a_url_that_nobody_opens_is_said() -> None:
    with pytest.raises(ShardError, match=r"nowhere://a\.tar: cannot be read: "):
        list(read_samples(Url("nowhere://a.tar")))


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def samples():
        yield SAMPLES[0]
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError):
        write_shard(tmp_path / "a.tar", samples())
    assert list(tmp_path.iterdir()) == []


def test_names_that_no_tar_header_holds() -> None:
    assert fits_a_tar("a" * 96, "ids") and fits_a_tar("f" * 150 + "/" + "a" * 90, "ids")
    assert not fits_a_tar("a" * 97, "ids") and not fits_a_tar("\ud800", "ids")


def test_a_folder_without_a_manifest_of_ours_is_said(tmp_path: Path) -> None:
    for content, message in (
        (None, "no manifest.json, so it is no folder of token shards"),
        ("{", "cannot be read"),
        ("[]", "not a manifest of format 1"),
        (json.dumps({"format": 2}), "not a manifest of format 1"),
    ):
        if content is not None:
            (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(ShardError, match=message):
            read_manifest(tmp_path)


@pytest.mark.parametrize("name", ["../a.tar", "/etc/passwd", "a/b.tar", "", "..", "a\n.tar", "a\x1b[2J.tar"])
def test_a_manifest_names_files_of_its_own_folder_only(tmp_path: Path, name: str) -> None:
    entry = {"name": name, "sha256": "0", "bytes": 1, "documents": 1}
    manifest = {"format": 1, "vocabulary": {"text": 30}, "tokenizers": {}, "shards": [entry]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"shards\[0\]: name = .*not the name of a file in this") as error:
        read_manifest(tmp_path)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizers": None}, "manifest.json: tokenizers: null, should be an object"),
        ({"tokenizers": {"text": {}}}, "manifest.json: tokenizers.text: fingerprint: required, but missing"),
        ({"vocabulary": {"text": "many"}}, r'manifest.json: vocabulary: sizes.text = "many"'),
        ({"vocabulary": {}}, "manifest.json: vocabulary: .*the first modality must be"),
        ({"vectors": []}, "manifest.json: vectors"),
        ({"vectors": {"image": {"features": 0, "dtype": "uint8"}}}, "vectors.image.features = 0"),
        ({"vectors": {"image": {"features": 2, "dtype": "uint8"}}}, "vectors of image, which has 0 ids"),
        ({"shards": [3]}, r"manifest.json: shards\[0\]: holds a whole number, not an object"),
        ({"shards": [{"name": "a", "sha256": "", "bytes": "1"}]}, r"shards\[0\]: bytes: a text, should be"),
    ],
)
def test_a_manifest_without_what_readers_need_is_refused_by_field(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    whole = {"format": 1, "vocabulary": {"text": 30}, "tokenizers": {}, "shards": []}
    (tmp_path / "manifest.json").write_text(json.dumps(whole))
    assert read_manifest(tmp_path) == whole
    (tmp_path / "manifest.json").write_text(json.dumps(whole | changes))
    with pytest.raises(ShardError, match=message):
        read_manifest(tmp_path)
