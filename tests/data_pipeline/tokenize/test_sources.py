from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Url, read_samples, write_shard
from data_pipeline.tokenize.sources import find_splits


def refusal(src: Path) -> str:
    with pytest.raises(ConfigError) as error:
        find_splits(str(src))
    return str(error.value)


def test_shards_in_sub_folders_are_splits(tmp_path: Path) -> None:
    for name in ("train/b.tar", "train/a.tar", "heldout/a.tar", "notes/readme.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"abc")
    heldout, train = find_splits(str(tmp_path))
    assert (heldout.name, train.name) == ("heldout", "train")
    assert train.listing == (("a.tar", 3), ("b.tar", 3))
    assert train.shards == [tmp_path / "train" / name for name in ("a.tar", "b.tar")]


def test_shards_in_the_folder_itself_are_one_nameless_split(tmp_path: Path) -> None:
    (tmp_path / "a.tar").touch()
    (split,) = find_splits(str(tmp_path))
    assert split.name == "" and split.shards == [tmp_path / "a.tar"]


def test_a_url_pattern_is_one_split() -> None:
    (split,) = find_splits("https://host/train-{000..002}.tar")
    assert split.shards == [Url(f"https://host/train-00{i}.tar") for i in range(3)]


@pytest.mark.parametrize("folder", [".", "pipe:touch ran;", "http:"])
def test_no_name_of_a_local_file_or_folder_is_taken_for_a_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    monkeypatch.chdir(tmp_path)
    shard = Path(folder) / "pipe:touch ran;cat good.tar #.tar"
    shard.parent.mkdir(exist_ok=True)
    write_shard(shard, [("0", {"json": b"{}"})])
    (split,) = find_splits(f"./{folder}")
    (location,) = split.shards
    assert location == shard.absolute() and list(read_samples(location)) == [("0", {"json": b"{}"})]
    assert not (tmp_path / "ran").exists()


def test_places_without_shards_are_said(tmp_path: Path) -> None:
    assert "no such folder" in refusal(tmp_path / "none")
    assert "holds nothing" in refusal(tmp_path)
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "deep").mkdir()
    assert "it holds deep/, photo.jpg. docs/data.md says which layouts" in refusal(tmp_path)
    assert "photo.jpg is no raw shard; legal: a folder of them, or *.tar" in refusal(tmp_path / "photo.jpg")
    (tmp_path / "deep" / "a.tar").touch()
    (tmp_path / "b.tar").touch()
    assert "holds shards itself and in deep" in refusal(tmp_path)


def test_the_first_kind_of_file_that_is_there_is_read_unless_a_pattern_says_which(tmp_path: Path) -> None:
    """Such as the tars of img2dataset, which has Parquet and JSON beside them."""
    for name in ("0.tar", "1.TAR.GZ", "2.tgz", "0.parquet", "0_stats.json", "a.jsonl", "images/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (split,) = find_splits(str(tmp_path))
    assert [name for name, _ in split.listing] == ["0.tar", "1.TAR.GZ", "2.tgz"]
    (split,) = find_splits(str(tmp_path), "*.jsonl")
    assert split.shards == [tmp_path / "a.jsonl"]
    (tmp_path / "picture.jpg").touch()
    with pytest.raises(
        ConfigError, match=r'picture.jpg: \[source\] files = "\*.jpg" matches it; it must end in'
    ):
        find_splits(str(tmp_path), "*.jpg")


def test_a_file_and_a_pattern_of_files_are_one_split(tmp_path: Path) -> None:
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "{x}.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (split,) = find_splits(str(tmp_path / "a" / "1.tar"))
    assert split.name == "" and split.shards == [tmp_path / "a" / "1.tar"]
    (split,) = find_splits(str(tmp_path / "{a,b}" / "{0..0}.tar"))
    assert split.shards == [tmp_path / "a" / "0.tar", tmp_path / "b" / "0.tar"]
    assert find_splits(str(tmp_path / "{x}.tar"))[0].shards == [tmp_path / "{x}.tar"], "a file of that name"
    assert "1.tar: no such file" in refusal(tmp_path / "b" / "{0..1}.tar")
    assert "no such folder or file" in refusal(tmp_path / "{a")
