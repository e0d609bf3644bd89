"""A stream from a URL is byte for byte that of the folder: over a bad network, a small cache and kills."""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path

import pytest

from data_pipeline.files.atomic import atomic_file
from data_pipeline.remote.folder import SourceGone
from data_pipeline.remote.location import RemoteSettings
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream import loader as loader_module
from data_pipeline.stream.fetch_ahead import bytes_in_use, cache_warnings
from data_pipeline.stream.loader import Loader, StepBatch
from data_pipeline.stream.stream import Stream, StreamState
from tests.data_pipeline.remote.flaky_server import STALL_S, bytes_of, serving, settings, write_folder

FORK = get_context("fork")
STEP_SEQUENCES = 12


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources, 470 KB and 80 KB; a document has 1.2 KB and a piece 8 KiB."""
    root = tmp_path_factory.mktemp("root")
    write_folder(root / "a", 400, 1)
    write_folder(root / "b", 70, 2)
    return root


def stream_of(places: Sequence[str | Path], remote: RemoteSettings | None = None) -> Stream:
    weights = (0.7, 0.3)
    sources = [(TokenSource.open(place, remote), w) for place, w in zip(places, weights, strict=False)]
    return Stream(sources, seed=1, context_tokens=64, sequences_per_step=STEP_SEQUENCES)


def loader_of(stream: Stream, *, dp_rank: int = 0, dp_size: int = 1, **options: object) -> Loader:
    return Loader(stream, dp_rank=dp_rank, dp_size=dp_size, micro_batch_sequences=1, **options)  # pyright: ignore


def digest(step: StepBatch) -> str:
    found = hashlib.sha256(f"{step.state_after} {step.digest} {step.unreadable}".encode())
    for batch in step.micro_batches:
        for name, value in vars(batch).items():
            found.update(repr(value).encode() if name in ("samples", "vectors") else value.tobytes())
    return found.hexdigest()


def digests(stream: Stream, num_steps: int, **options: object) -> list[str]:
    with loader_of(stream, **options) as loader:
        return [digest(loader.next_step()) for _ in range(num_steps)]


@pytest.mark.parametrize(
    "num_steps, documents", [(100, 400), pytest.param(1000, 2000, marks=pytest.mark.full)]
)
def test_batches_over_a_server_that_fails_at_random_are_those_of_the_folder(
    root: Path, tmp_path: Path, num_steps: int, documents: int
) -> None:
    """The cache holds less than the sources, so pieces are dropped and fetched again all the time."""
    folders = [root / "a", root / "b"]
    if documents > 400:
        folders = [
            write_folder(tmp_path / "data" / "a", documents, 3),
            write_folder(tmp_path / "data/b", 300, 4),
        ]
    expected = digests(stream_of(folders), num_steps)
    most = sum(entry.stat().st_size for entry in folders[0].iterdir())
    with serving(folders[0].parent, seed=5, fault_frac=0.2) as server:
        remote = settings(tmp_path / "cache", cache_bytes=most, stall_s=STALL_S)
        stream = stream_of([f"{server.url}/{folder.name}" for folder in folders], remote)
        with loader_of(stream) as loader:
            for number in range(num_steps):
                assert digest(loader.next_step()) == expected[number], number
                assert number % 10 or bytes_of(tmp_path / "cache") <= most
        assert set(server.met) == set(server.faults), "every fault was met"
        pieces = sum(-(-path.stat().st_size // 8192) for folder in folders for path in folder.glob("*.tar"))
        assert server.requests.total() > pieces, "pieces were fetched again"


def test_ranks_of_a_node_fetch_a_piece_once_and_ahead(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        remote = settings(tmp_path / "cache")
        streams = [stream_of([f"{server.url}/a"], remote) for _ in range(2)]
        loaders = [loader_of(s, dp_rank=r, dp_size=2, prefetch_steps=r) for r, s in enumerate(streams)]
        for _ in range(3):
            for loader in loaders:
                loader.next_step()
        deadline = time.monotonic() + 30
        pieces = sum(-(-path.stat().st_size // 8192) for path in (root / "a").glob("*.tar"))
        while len([name for name in server.requests if ".tar" in name]) < pieces:
            assert time.monotonic() < deadline, "steps that lie ahead are not fetched"
            time.sleep(0.01)
        for loader in loaders:
            loader.close()
        asked = {name: count for name, count in server.requests.items() if ".tar" in name}
        assert len(asked) == pieces and set(asked.values()) == {1}


def _read(places: list[str], remote: RemoteSettings, out: Path, rank: int, num_steps: int) -> None:
    """Read on from the state in `out`, noting what each step was, as a training loop saves it."""
    saved = out / f"rank{rank}.json"
    begun = json.loads((out / "resume.json").read_text()) if (out / "resume.json").exists() else None
    state = None if begun is None else StreamState.from_json(begun["state"])
    stream = stream_of(places, remote)
    with loader_of(stream, dp_rank=rank, dp_size=2, state=state) as loader:
        for step in range(begun["step"] if begun else 0, num_steps):
            taken = loader.next_step()
            with open(out / f"rank{rank}.log", "a") as log:
                log.write(f"{step} {digest(taken)}\n")
            with atomic_file(saved) as file:
                file.write(json.dumps({"step": step + 1, "state": taken.state_after.to_json()}).encode())
            time.sleep(0.01)  # a rank that is killed is not at its end


def test_ranks_that_are_killed_go_on_exactly_with_what_their_cache_holds(root: Path, tmp_path: Path) -> None:
    expected = [digests(stream_of([root / "a"]), 24, dp_rank=rank, dp_size=2) for rank in range(2)]
    with serving(root, seed=7, fault_frac=0.1) as server:
        places, most = [f"{server.url}/a"], 400_000
        remote = settings(tmp_path / "cache", cache_bytes=most, stall_s=STALL_S)
        for until, last in ((5, 10_000), (12, 10_000), (24, 24)):
            ranks = [FORK.Process(target=_read, args=(places, remote, tmp_path, r, last)) for r in range(2)]
            for rank in ranks:
                rank.start()
            while until < 24 and min(_steps(tmp_path)) < until:
                assert all(rank.is_alive() for rank in ranks)
                time.sleep(0.002)
            for rank in ranks:
                assert rank.pid is not None
                if until < 24:
                    os.kill(rank.pid, signal.SIGKILL)
                rank.join(60)
            assert bytes_of(tmp_path / "cache") <= most
            least = min((tmp_path / f"rank{r}.json" for r in range(2)), key=lambda path: _step(path))
            (tmp_path / "resume.json").write_text(least.read_text())
    for rank in range(2):
        lines = [line.split() for line in (tmp_path / f"rank{rank}.log").read_text().splitlines()]
        compared = [(int(step), found) for step, found in lines if int(step) < 24]
        assert {step for step, _ in compared} == set(range(24))
        assert all(found == expected[rank][step] for step, found in compared)


def _step(path: Path) -> int:
    return json.loads(path.read_text())["step"] if path.exists() else 0


def _steps(out: Path) -> list[int]:
    return [_step(out / f"rank{rank}.json") for rank in range(2)]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_source_that_dies_is_named_and_a_wait_says_what_for(
    root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    prefetch_steps: int,
) -> None:
    monkeypatch.setattr(loader_module, "_TELL_EVERY_S", 0.1)
    with serving(root) as server:
        remote = settings(tmp_path / "cache", retry_s=0.4, cache_bytes=200_000)
        stream = stream_of([f"{server.url}/a"], remote)
        with loader_of(stream, prefetch_steps=prefetch_steps) as loader:
            loader.next_step()
            server.fault_frac, server.faults = 1.0, ("500",)
            with pytest.raises(SourceGone, match=rf"{server.url}/a/tokens-\d+\.tar: HTTP 500 "):
                for _ in range(200):
                    loader.next_step()
    if prefetch_steps:
        told = capsys.readouterr().err
        assert f"waiting for data for 0 s: {server.url}/a/tokens-0000" in told and "(HTTP 500" in told


def test_a_loader_that_is_closed_waits_for_no_dead_source(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        remote = settings(tmp_path / "cache", retry_s=10_000.0, cache_bytes=200_000)
        with loader_of(stream_of([f"{server.url}/a"], remote)) as loader:
            loader.next_step()
            server.fault_frac, server.faults = 1.0, ("500",)
            asked, deadline = server.met["500"], time.monotonic() + 30
            while server.met["500"] < asked + 20:  # the thread that reads ahead tries again and again
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_threads_end_with_their_loader(root: Path, tmp_path: Path) -> None:
    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if t.name.startswith(("fetch data", "plan fetches"))]

    deadline = time.monotonic() + 30
    while threads():  # of other tests
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with serving(root) as server:
        stream = stream_of([f"{server.url}/a"], settings(tmp_path / "cache"))
        with loader_of(stream) as loader:
            loader.next_step()
            assert len(threads()) == 9
        while threads():
            assert time.monotonic() < deadline
            time.sleep(0.01)
    with loader_of(stream_of([root / "a"])) as loader:
        loader.next_step()
        assert not threads(), "a folder needs none"


def test_a_cache_that_is_too_small_is_told(root: Path, tmp_path: Path) -> None:
    with serving(root) as server:
        places = [f"{server.url}/a", f"{server.url}/b"]
        stream = stream_of(places, settings(tmp_path / "cache", cache_bytes=600_000))
        sizes = [bytes_in_use(source, source.remote) for source in stream.sources if source.remote]
        assert sizes == [sum(e["bytes"] for e in source.manifest["shards"]) for source in stream.sources]
        (line,) = cache_warnings(stream)
        assert line.startswith(f"warning: {tmp_path}/cache: data.cache_gb = 0.0006, but the documents among")
        assert not cache_warnings(stream_of(places, settings(tmp_path / "large")))
    assert not cache_warnings(stream_of([root / "a"]))
