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
    assert "it holds deep/, photo.jpg. Raw data is WebDataset shards" in refusal(tmp_path)
    assert "not a folder" in refusal(tmp_path / "photo.jpg")
    (tmp_path / "deep" / "a.tar").touch()
    (tmp_path / "b.tar").touch()
    assert "holds shards itself and in deep" in refusal(tmp_path)
