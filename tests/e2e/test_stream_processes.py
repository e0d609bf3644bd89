"""The stream with one process per rank: any number of ranks, killed and resumed, few shards."""

import hashlib
import json
import multiprocessing
import os
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from data_pipeline.files.atomic import atomic_file
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_documents, write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream, StreamState

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
STEP_SEQUENCES = 12
WEIGHTS = (0.35, 0.65)
FORK = multiprocessing.get_context("fork")  # imports of torch would be most of this test


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two sources; the second is a single shard, and gone through several times."""
    root = tmp_path_factory.mktemp("sources")
    return [
        write_token_folder(
            root / name,
            list(random_documents(VOCABULARY, count, seed, median_text_tokens=10, image_tokens=9)),
            VOCABULARY,
            documents_per_shard=100,
        )
        for name, count, seed in (("a", 250, 1), ("b", 60, 2))
    ]


def _rank(
    folders: list[Path],
    out: Path,
    dp_rank: int,
    dp_size: int,
    prefetch_steps: int,
    num_steps: int,
    pace_s: float,
) -> None:
    """Read steps to `num_steps` from the state saved in `out`, if any, noting what was read at each.

    A step's bytes are noted first and its state saved last, as a training loop does it.
    """
    sources = [(TokenSource.open(folder), weight) for folder, weight in zip(folders, WEIGHTS, strict=True)]
    stream = Stream(sources, seed=1, context_tokens=64, sequences_per_step=STEP_SEQUENCES)
    saved = out / f"rank{dp_rank}.json"
    begin = json.loads((out / "resume.json").read_text()) if (out / "resume.json").exists() else None
    state = StreamState.from_json(begin["state"]) if begin else stream.start()
    loader = Loader(
        stream,
        dp_rank=dp_rank,
        dp_size=dp_size,
        micro_batch_sequences=1,
        prefetch_steps=prefetch_steps,
        state=state,
    )
    for step in range(begin["step"] if begin else 0, num_steps):
        taken = loader.next_step()
        for i, batch in enumerate(taken.micro_batches):
            data = b"".join(
                repr(value).encode() if name in ("samples", "vectors") else value.tobytes()
                for name, value in vars(batch).items()
            )
            position = dp_rank + i * dp_size
            with open(out / f"rank{dp_rank}.log", "a") as log:
                log.write(f"{step} {position} {hashlib.sha256(data).hexdigest()}\n")
        with atomic_file(saved) as file:
            file.write(json.dumps({"step": step + 1, "state": taken.state_after.to_json()}).encode())
        time.sleep(pace_s)
    if dp_rank % 2 == 0:  # one that just ends must not hang either
        loader.close()


def _start(
    folders: list[Path],
    out: Path,
    dp_size: int,
    prefetch_steps: int,
    num_steps: int = 30,
    pace_s: float = 0.0,
) -> list[BaseProcess]:
    out.mkdir(exist_ok=True)
    ranks: list[BaseProcess] = []
    for r in range(dp_size):
        arguments = (folders, out, r, dp_size, prefetch_steps, num_steps, pace_s)
        ranks.append(FORK.Process(target=_rank, args=arguments))
        ranks[-1].start()
    return ranks


def _finish(ranks: list[BaseProcess]) -> None:
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0, "a rank failed, or hangs"


def _batches(out: Path) -> dict[int, list[str]]:
    """Step -> digests by position in the global batch. A step that was read twice must agree with itself."""
    found: dict[int, dict[int, str]] = {}
    for log in out.glob("rank*.log"):
        for line in log.read_text().splitlines():
            step, position, digest = line.split()
            assert found.setdefault(int(step), {}).setdefault(int(position), digest) == digest
    return {step: [found[step][p] for p in sorted(found[step])] for step in sorted(found)}


@pytest.fixture(scope="module")
def reference(folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    out = tmp_path_factory.mktemp("reference")
    _finish(_start(folders, out, 1, 0))
    batches = _batches(out)
    assert list(batches) == list(range(30)) and all(len(b) == STEP_SEQUENCES for b in batches.values())
    # not all differ: a piece of a long document that fills a sequence by itself comes again with each epoch
    assert len({digest for batch in batches.values() for digest in batch}) > 0.8 * 30 * STEP_SEQUENCES
    return batches


@pytest.mark.parametrize(
    ("dp_size", "prefetch_steps"), [(1, 1), (1, 4), (2, 0), (2, 2), (3, 0), (3, 1), (4, 2)]
)
def test_ranks_and_reading_ahead_do_not_change_a_byte(
    folders: list[Path], reference: dict[int, list[str]], tmp_path: Path, dp_size: int, prefetch_steps: int
) -> None:
    """Also with fewer shards than ranks: the second source has one."""
    _finish(_start(folders, tmp_path, dp_size, prefetch_steps))
    assert _batches(tmp_path) == reference


@pytest.mark.parametrize(("sizes", "ahead"), [((4, 3, 1), (1, 0, 2)), ((1, 2, 4), (2, 1, 0))])
def test_killed_and_resumed_with_another_number_of_ranks_and_steps_ahead(
    folders: list[Path],
    reference: dict[int, list[str]],
    tmp_path: Path,
    sizes: tuple[int, ...],
    ahead: tuple[int, ...],
) -> None:
    for attempt, (dp_size, prefetch_steps) in enumerate(zip(sizes[:-1], ahead[:-1], strict=True)):
        ranks = _start(folders, tmp_path, dp_size, prefetch_steps, 10_000, pace_s=0.01)
        resume = _wait_for_step(tmp_path, dp_size, 8 * (attempt + 1))
        for rank in ranks:
            assert rank.pid is not None
            os.kill(rank.pid, signal.SIGKILL)
        for rank in ranks:
            rank.join(20)
        # the last step that all ranks have done: where the checkpoint of a training would stand
        assert resume["step"] >= 8 * (attempt + 1)
        (tmp_path / "resume.json").write_text(json.dumps(resume))
        for left in tmp_path.glob("rank*.json"):
            left.unlink()
    steps = max(30, resume["step"] + 3)
    _finish(_start(folders, tmp_path, sizes[-1], ahead[-1], steps))
    found = _batches(tmp_path)
    assert {step: found[step] for step in reference} == reference


def _wait_for_step(out: Path, dp_size: int, step: int) -> dict:
    """The least advanced of the states that the ranks have saved, once that is `step` or more."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        paths = [out / f"rank{r}.json" for r in range(dp_size)]
        if all(path.exists() for path in paths):
            states = [json.loads(path.read_text()) for path in paths]
            least = min(states, key=lambda state: state["step"])
            if least["step"] >= step:
                return least
        time.sleep(0.005)
    raise AssertionError(f"no rank came to step {step}")
