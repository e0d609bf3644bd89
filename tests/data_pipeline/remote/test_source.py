"""A URL opens as the folder behind it, index included, or one message says what is missing there."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.folder import SourceGone
from data_pipeline.shards.index import TokenSource
from tests.data_pipeline.remote.flaky_server import serving, settings, write_folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "root" / "a", 100, 1)


def test_a_url_opens_as_the_folder_does(data: Path, tmp_path: Path) -> None:
    local = TokenSource.open(data)
    with serving(data.parent) as server:
        remote = TokenSource.open(f"{server.url}/a/?sig=SECRET", settings(tmp_path / "cache"))
        assert str(remote.folder) == f"{server.url}/a"
        assert remote.index_hash == local.index_hash and remote.shard_hashes == local.shard_hashes
        for document in (0, 39, 40, 99):
            assert remote.name(document) == local.name(document)
            assert np.array_equal(remote.read(document), local.read(document))
        TokenSource.open(f"{server.url}/a/?sig=SECRET", settings(tmp_path / "cache"))
        assert server.requests["/a/index.bin 0"] == 1, "the index is kept"


def test_what_is_damaged_in_the_cache_is_fetched_again(data: Path, tmp_path: Path) -> None:
    cache, local = tmp_path / "cache", TokenSource.open(data)
    with serving(data.parent) as server:
        remote = TokenSource.open(f"{server.url}/a", settings(cache))
        expected = [local.read(document) for document in range(100)]
        for changed in ("bits", "cut", "gone"):
            for document in range(100):
                assert np.array_equal(remote.read(document), expected[document]), changed
            for path in [path for path in (cache / "files").rglob("*") if path.is_file()]:
                content = path.read_bytes()
                flipped = bytes(255 - byte for byte in content)
                path.unlink()  # what is mapped of the index stays as it is
                path.write_bytes({"bits": flipped, "cut": content[:-1], "gone": b""}[changed])
        TokenSource.open(f"{server.url}/a", settings(cache))  # its index was damaged too


def test_what_is_damaged_at_the_source_is_told_as_that(data: Path, tmp_path: Path) -> None:
    source = TokenSource.open(data)
    path = data / "tokens-00001.tar"
    content = bytearray(path.read_bytes())
    content[int(source.index.offset[50]) + 2] ^= 1
    path.write_bytes(content)
    with serving(data.parent) as server:
        remote = TokenSource.open(f"{server.url}/a", settings(tmp_path / "cache"))
        name, found, _ = remote.fetch(50)
        assert name == source.name(50) and found is None
        assert np.array_equal(remote.read(51), source.read(51))
        asked = max(count for asked, count in server.requests.items() if "tokens-00001" in asked)
        assert asked == 2, "it was asked for a second time"


def test_what_is_missing_there_is_one_sentence(data: Path, tmp_path: Path) -> None:
    one = settings(tmp_path / "cache", retry_s=0.05)
    with serving(data.parent) as server:
        with pytest.raises(SourceGone, match=r"/gone/manifest\.json: HTTP 404 .*see that the file is there"):
            TokenSource.open(f"{server.url}/gone", one)
        shutil.copytree(data, data.parent / "b")
        (data.parent / "b/index.bin").unlink()
        with pytest.raises(
            SourceGone, match=r"/b/index\.bin: HTTP 404 .*needs the index\.bin that `motley tok"
        ):
            TokenSource.open(f"{server.url}/b", one)
        other = write_folder(tmp_path / "other", 50, 2)
        shutil.copy(other / "index.bin", data.parent / "b")
        with pytest.raises(
            ConfigError, match=r"/b/index\.bin: made for other shards than manifest\.json lists"
        ):
            TokenSource.open(f"{server.url}/b", one)
        (data.parent / "b/index.bin").write_bytes((data / "index.bin").read_bytes()[:-1] + b"x")
        with pytest.raises(ConfigError, match=r"/b/index\.bin: damaged, it does not match its own hash"):
            TokenSource.open(f"{server.url}/b", one)
        (data.parent / "b/manifest.json").write_text("<html>log in</html>")
        with pytest.raises(ConfigError, match=rf"^{server.url}/b/manifest\.json: cannot be read"):
            TokenSource.open(f"{server.url}/b", one)
    with pytest.raises(ConfigError, match="no reader for ftp://"):
        TokenSource.open("ftp://host/a", one)


def test_what_a_command_gave_is_read_later_without_running_it(data: Path, tmp_path: Path) -> None:
    url, cache = f"pipe:cat {data}/{{}}", tmp_path / "cache"
    with pytest.raises(ConfigError, match="alone run a command"):
        TokenSource.open(url, settings(cache))
    run = TokenSource.open(url, settings(cache, runs_commands=True))
    later = TokenSource.open(url, settings(cache))
    assert later.index_hash == run.index_hash
    with pytest.raises(ConfigError, match="alone run a command"):
        later.read(0)
