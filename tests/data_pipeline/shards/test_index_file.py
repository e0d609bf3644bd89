import os
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ChangedIndex
from data_pipeline.shards.index import TokenSource, build_index
from data_pipeline.shards.index_file import INDEX, index_hash, map_arrays, read_header, write_index
from data_pipeline.shards.synthetic import random_documents, write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    documents = list(random_documents(VOCABULARY, 60, 0, median_text_tokens=8, image_tokens=5))
    return write_token_folder(tmp_path / "tokens", documents, VOCABULARY, documents_per_shard=25)


@pytest.mark.parametrize("optional", [(), ("masked",), ("vectors",), ("masked", "vectors")])
def test_optional_arrays_are_both_of_a_pair_or_none(tmp_path: Path, optional: tuple[str, ...]) -> None:
    pairs = {"masked": ("masked_first", "masked"), "vectors": ("vectors_offset", "vectors_crc32")}
    names = ["offset", "length", "crc32", "shard_first", "span_first", "span"]
    names += [name for each in optional for name in pairs[each]]
    arrays = {name: np.arange(4).reshape(2, 2) + len(name) for name in names}

    def write(names: list[str]) -> dict[str, object]:
        of = {"format": 1, "manifest": "m", "longest_span_tokens": 0, "arrays": {n: [2, 2] for n in names}}
        of["hash"] = index_hash(of, {name: arrays[name] for name in names})
        write_index(tmp_path, of, {name: arrays[name] for name in names})
        return of

    header = write(names)
    assert read_header(tmp_path) == header
    found = map_arrays(tmp_path, header)
    assert found.span.tolist() == arrays["span"].tolist()
    assert (found.masked is None) == ("masked" not in optional)
    assert (found.vectors_crc32 is None) == ("vectors" not in optional)
    for wrong in (names[:-1], names[::-1]):
        with pytest.raises(ChangedIndex):
            map_arrays(tmp_path, write(wrong))


def test_what_a_killed_process_left_behind_is_cleared_away(folder: Path) -> None:
    dead, alive = (folder / f"{INDEX}.{name}.tmp" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    TokenSource.open(folder)
    assert not dead.exists() and alive.exists()


def test_an_index_that_cannot_be_written_or_read_is_said_so(folder: Path) -> None:
    (folder / INDEX).mkdir()  # root may write anywhere: what stops it is a folder in the way
    with pytest.raises(
        ConfigError, match=r"no index for these shards yet, and it cannot be written \(Is a dir"
    ):
        build_index(folder)
    with pytest.raises(ConfigError, match=r"index\.bin: cannot be read \(Is a directory"):
        TokenSource.open(folder)
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("at", [3, 20, 150, 250, 310, 400, -1])
def test_a_changed_index(folder: Path, at: int) -> None:
    TokenSource.open(folder)
    data = bytearray((folder / INDEX).read_bytes())
    data[at] ^= 1
    (folder / INDEX).write_bytes(data)
    with pytest.raises(ChangedIndex, match=r"index\.bin: damaged.*delete it, and it is made again"):
        TokenSource.open(folder)
    (folder / INDEX).unlink()
    assert TokenSource.open(folder).num_documents == 60


def test_a_truncated_index(folder: Path) -> None:
    TokenSource.open(folder)
    os.truncate(folder / INDEX, (folder / INDEX).stat().st_size // 2)
    with pytest.raises(ChangedIndex, match="damaged"):
        TokenSource.open(folder)


def test_an_index_that_somebody_made_up_is_damaged(folder: Path) -> None:
    """Its JSON is nested without end, or it states arrays that no file holds."""
    TokenSource.open(folder)
    magic = (folder / INDEX).read_bytes()[:8]
    for text in (b"[" * 200_000, b'{"format": ' + b"[" * 200_000):
        (folder / INDEX).write_bytes(magic + len(text).to_bytes(8, "little") + text)
        with pytest.raises(ChangedIndex, match="damaged"):
            TokenSource.open(folder)
    (folder / INDEX).unlink()
    TokenSource.open(folder)
    header = read_header(folder)
    assert header is not None
    with pytest.raises(ChangedIndex, match="damaged"):
        map_arrays(folder, header | {"arrays": {"offset": [2**70]}})
