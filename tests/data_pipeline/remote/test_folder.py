"""Bytes of a folder behind a URL are those of its files, whatever its server does, or a message says why."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.remote.folder import RemoteFolder, RemoteShards, SourceGone
from data_pipeline.shards.tar import MANIFEST, Url, read_manifest
from tests.data_pipeline.remote.flaky_server import (
    STALL_S,
    FlakyServer,
    bytes_of,
    serving,
    settings,
    write_folder,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data") / "a", 100, 1)


def shards_of(server: FlakyServer, data: Path, cache: Path, **changes: object) -> RemoteShards:
    folder = RemoteFolder(Url(f"{server.url}/a"), settings(cache, **changes))
    return RemoteShards(folder, read_manifest(data)["shards"])


def test_any_bytes_of_a_shard_are_those_of_its_file(data: Path, tmp_path: Path) -> None:
    with serving(data.parent) as server:
        shards = shards_of(server, data, tmp_path, piece_bytes=1000)
        for shard in (0, 2):
            content = (data / f"tokens-{shard:05d}.tar").read_bytes()
            for start, size in ((0, 1), (999, 2), (500, 4000), (len(content) - 5, 100), (len(content), 9)):
                assert shards.read(shard, start, size) == content[start : start + size]
        before = server.requests.total()
        assert shards.read(0, 500, 4000) == (data / "tokens-00000.tar").read_bytes()[500:4500]
        assert server.requests.total() == before, "all of it is kept"


@pytest.mark.parametrize("seed", range(3))
def test_a_server_that_fails_at_random_gives_the_same_bytes(data: Path, tmp_path: Path, seed: int) -> None:
    with serving(data.parent, seed=seed, fault_frac=0.5) as server:
        shards = shards_of(server, data, tmp_path / "cache", stall_s=STALL_S)
        shards.folder.fetch(MANIFEST)
        assert (shards.folder.local / MANIFEST).read_bytes() == (data / MANIFEST).read_bytes()
        content = (data / "tokens-00001.tar").read_bytes()
        assert shards.read(1, 0, len(content)) == content
        assert server.met
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_source_that_gives_no_ranges_is_fetched_once(data: Path, tmp_path: Path) -> None:
    with serving(data.parent, fault_frac=1.0, faults=("whole",)) as server:
        shards = shards_of(server, data, tmp_path, piece_bytes=1000)
        for start in (20_000, 0, 5000):
            assert shards.read(1, start, 10) == (data / "tokens-00001.tar").read_bytes()[start : start + 10]
        assert server.requests.total() == 1 and bytes_of(tmp_path) == shards.num_bytes(1)


@pytest.mark.parametrize(
    "fault, expected",
    [
        (
            "500",
            r"/a/tokens-00000.tar: HTTP 500 .* attempts in \d+ s\); see that its server answers, or raise",
        ),
        (
            "404",
            r"/a/tokens-00000.tar: HTTP 404 .* attempts in \d+ s\); see that the file is there, and that",
        ),
        (
            "truncate",
            r"ended after 4096 of 8192 bytes .*Then the same command goes on from the last checkpoint",
        ),
    ],
)
def test_a_source_that_stays_away_is_named(data: Path, tmp_path: Path, fault: str, expected: str) -> None:
    with serving(data.parent, fault_frac=1.0, faults=(fault,)) as server:
        shards = shards_of(server, data, tmp_path, retry_s=0.2)
        with pytest.raises(SourceGone, match=expected):
            shards.read(0, 0, 100)
        tries = server.requests.total()
        assert tries > 2
        with pytest.raises(SourceGone, match=r"\(1 attempt\)"):
            shards.read(1, 0, 100)
        assert server.requests.total() == tries + 1, "patience is spent once"
        server.fault_frac = 0.0
        assert shards.read(1, 0, 100) == (data / "tokens-00001.tar").read_bytes()[:100]
    assert not shards.folder.fetching


def test_a_shard_of_another_size_is_named(data: Path, tmp_path: Path) -> None:
    with serving(data.parent) as server:
        shards = shards_of(server, data, tmp_path, retry_s=0.1)
        entries = read_manifest(data)["shards"]
        longer = RemoteShards(shards.folder, [{**entries[0], "bytes": entries[0]["bytes"] + 1}])
        with pytest.raises(SourceGone, match=r"it holds \d+ bytes where manifest\.json says \d+ "):
            longer.read(0, 0, 100)


def test_commands_are_run_for_who_typed_them_alone(data: Path, tmp_path: Path) -> None:
    url, entries = Url(f"pipe:cat {data}/{{}}"), read_manifest(data)["shards"]
    allowed = settings(tmp_path / "cache", runs_commands=True)
    shards = RemoteShards(RemoteFolder(url, allowed), entries)
    assert shards.read(1, 20_000, 10) == (data / "tokens-00001.tar").read_bytes()[20_000:20_010]
    refused = RemoteFolder(url, replace(allowed, runs_commands=False))
    with pytest.raises(ValueError, match="alone run a command, because a run's directory may be somebody"):
        refused.fetch(MANIFEST)
    hostile = {**entries[0], "name": f"$(touch {tmp_path}.x)", "sha256": "another"}
    with pytest.raises(ValueError, match="has a name that no command is given"):
        RemoteShards(RemoteFolder(url, allowed), [hostile]).read(0, 20_000, 10)
    assert not list(tmp_path.parent.glob("*.x"))
