"""A cache is bounded, shared by processes, and survives whatever ends them."""

import os
import signal
import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote import node_cache
from data_pipeline.remote.node_cache import Key, NodeCache
from tests.data_pipeline.remote.flaky_server import bytes_of

FORK = get_context("fork")


def write(cache: NodeCache, key: Key, data: bytes) -> None:
    with cache.new_file(key, len(data)) as file:
        file.write(data)


def test_what_was_needed_longest_ago_goes_first_and_the_bound_holds(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    keys = [Key(f"piece {i}") for i in range(30)]
    for i, key in enumerate(keys):
        write(cache, key, bytes([i]) * 100)
        os.utime(cache.path(key), (i, i))
        assert cache.is_there(keys[0]), "needed all along"
        assert bytes_of(tmp_path) <= 1000
    there = [i for i, key in enumerate(keys) if cache.is_there(key)]
    assert there == [0, *range(30 - len(there) + 1, 30)] and len(there) >= 8
    assert cache.read(keys[29], 10, 30, 100) == bytes([29]) * 20
    assert cache.read(keys[5], 0, 10, 100) is None


def test_files_that_are_being_written_count_as_what_they_will_be(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    write(cache, Key("old"), bytes(300))
    with cache.new_file(Key("new"), 800) as file:
        assert not cache.is_there(Key("old")), "its room was needed"
        with pytest.raises(
            ConfigError, match=r"no room for 300 bytes within data\.cache_gb = 1e-06, .*800 by"
        ):
            write(cache, Key("third"), bytes(300))
        file.write(bytes(800))
    assert bytes_of(tmp_path) == 800 and not list(tmp_path.rglob("*.tmp"))


def test_an_error_leaves_nothing_and_a_lost_count_is_made_again(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    with pytest.raises(ZeroDivisionError), cache.new_file(Key("a"), 100):
        raise ZeroDivisionError
    assert bytes_of(tmp_path) == 0 and not cache.is_there(Key("a"))
    for i in range(9):
        write(cache, Key(str(i)), bytes(100))
    for text in ("", "9", "nine\n"):  # a writer was killed, or somebody wrote there
        (tmp_path / "used").write_text(text)
        write(cache, Key(f"more {text}"), bytes(100))
        assert bytes_of(tmp_path) <= 1000


def test_a_file_of_another_size_is_no_file(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    write(cache, Key("a"), bytes(100))
    assert cache.read(Key("a"), 0, 10, 99) is None and not cache.is_there(Key("a"))


def test_files_that_share_a_folder_have_their_names(tmp_path: Path) -> None:
    cache = NodeCache(tmp_path, 1000)
    for name in ("manifest.json", "index.bin"):
        write(cache, Key("https://host/../../x", name), name.encode())
    folder = cache.path(Key("https://host/../../x"))
    assert sorted(path.name for path in folder.iterdir()) == ["index.bin", "manifest.json"]
    assert folder.is_relative_to(tmp_path / "files")


def _hold(folder: Path) -> None:
    cache = NodeCache(folder, 1000)
    with cache.held(Key("a")), cache.new_file(Key("a"), 600) as file:
        file.write(bytes(300))
        file.flush()
        (folder / "ready").touch()
        time.sleep(600)


def test_who_is_killed_lets_others_fetch_and_its_half_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = FORK.Process(target=_hold, args=(tmp_path,))
    writer.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.005)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    cache = NodeCache(tmp_path, 1000)
    with cache.held(Key("a")):
        assert not cache.is_there(Key("a")) and len(list(tmp_path.rglob("*.tmp"))) == 1
        monkeypatch.setattr(node_cache, "_DEAD_AFTER_S", 0.0)
        write(cache, Key("a"), bytes(600))
    assert bytes_of(tmp_path) == 600 and not list(tmp_path.rglob("*.tmp"))


def test_the_default_is_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = node_cache.default_folder()
    assert folder == tmp_path / f"motley-cache-{os.getuid()}" and folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    (tmp_path / "mine").mkdir()
    folder.symlink_to(tmp_path / "mine")  # who made the link chooses what is read
    with pytest.raises(ConfigError, match=r"belongs to somebody else; set data\.cache_dir"):
        node_cache.default_folder()
