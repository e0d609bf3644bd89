import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset as wds

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ShardError, WrongChecksum
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_documents, random_vectors, write_token_folder
from data_pipeline.shards.vocabulary import VectorFormat, Vocabulary
from data_pipeline.stream.batch import Batch
from data_pipeline.stream.loader import Loader, StepBatch, check_readable, sequences
from data_pipeline.stream.stream import Stream, StreamState

VOCABULARY = Vocabulary(
    sizes={"text": 300, "image": 1, "speech": 32},
    vectors={"image": VectorFormat(features=6, dtype="uint8", mean=128.0, std=64.0)},
)
CONTEXT = 64
STEP_SEQUENCES = 12


def write(folder: Path, count: int, seed: int) -> Path:
    documents = list(random_documents(VOCABULARY, count, seed, median_text_tokens=10, image_tokens=9))
    return write_token_folder(folder, documents, VOCABULARY, documents_per_shard=40)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("sources")
    return [write(root / "a", 100, 1), write(root / "b", 70, 2)]


def stream_of(folders: list[Path]) -> Stream:
    pairs = [(TokenSource.open(folder), weight) for folder, weight in zip(folders, (0.6, 0.4), strict=False)]
    return Stream(pairs, seed=1, context_tokens=CONTEXT, sequences_per_step=STEP_SEQUENCES)


@pytest.fixture
def stream(folders: list[Path]) -> Stream:
    return stream_of(folders)


def digest(batch: Batch, row: int) -> str:
    """Of all bytes of a sequence: every array, and the names."""
    found = hashlib.sha256(repr(batch.samples[row]).encode())
    for name, value in vars(batch).items():
        if name not in ("samples", "vectors"):
            found.update(f"{name} {value.dtype} {value.shape[1:]}".encode() + value[row].tobytes())
    found.update(batch.vectors["image"].rows(row, row + 1).values.tobytes())
    return found.hexdigest()


def local_digests(step: StepBatch) -> list[str]:
    return [digest(batch, row) for batch in step.micro_batches for row in range(batch.num_sequences)]


def steps(
    stream: Stream,
    dp_size: int,
    prefetch_steps: int,
    num_steps: int,
    micro: int = 1,
    state: StreamState | None = None,
) -> tuple[list[list[str]], list[StreamState]]:
    """(digests of each global batch in order, states after each step), read by `dp_size` loaders."""
    loaders = [
        Loader(
            stream,
            dp_rank=r,
            dp_size=dp_size,
            micro_batch_sequences=micro,
            prefetch_steps=prefetch_steps,
            state=state,
        )
        for r in range(dp_size)
    ]
    batches, states = [], []
    try:
        for _ in range(num_steps):
            parts = [loader.next_step() for loader in loaders]
            assert len({(p.state_after, p.fill_frac, p.epochs) for p in parts}) == 1, "the same on all ranks"
            locals_ = [local_digests(part) for part in parts]
            batches.append([locals_[p % dp_size][p // dp_size] for p in range(STEP_SEQUENCES)])
            states.append(parts[0].state_after)
    finally:
        for loader in loaders:
            loader.close()
    return batches, states


@pytest.fixture(scope="module")
def reference(folders: list[Path]) -> tuple[list[list[str]], list[StreamState]]:
    return steps(stream_of(folders), dp_size=1, prefetch_steps=0, num_steps=15)


@pytest.mark.parametrize(
    ("dp_size", "prefetch_steps", "micro"),
    [(1, 1, 4), (1, 20, 12), (2, 0, 3), (2, 2, 1), (3, 1, 2), (4, 3, 3)],
)
def test_every_global_batch_is_the_same_bytes(
    stream: Stream, reference: tuple, dp_size: int, prefetch_steps: int, micro: int
) -> None:
    assert steps(stream, dp_size, prefetch_steps, 15, micro) == reference


def test_what_is_read_is_what_is_written(stream: Stream) -> None:
    """Against the documents themselves, laid out slot by slot."""
    documents = [
        list(random_documents(VOCABULARY, count, seed, median_text_tokens=10, image_tokens=9))
        for count, seed in ((100, 1), (70, 2))
    ]
    state, continued, of_images = stream.start(), 0, 0
    with Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=12) as loader:
        for _ in range(4):
            (batch,) = loader.next_step().micro_batches
            plan, state = stream.plan_step(state)
            continued += int((plan.start > 0).sum())
            for row in range(12):
                slot = 0
                vectors: list[list[int]] = []
                for number, piece in enumerate(range(plan.first[row], plan.first[row + 1])):
                    ids = documents[plan.source[piece]][plan.document[piece]]
                    shard, key = batch.samples[row][number].split("/")
                    assert int(key) == plan.document[piece] and shard == f"tokens-{int(key) // 40:05d}.tar"
                    start = int(plan.start[piece])
                    own = random_vectors(np.random.default_rng(int(key)), ids, VOCABULARY)["image"].tolist()
                    is_image = ids == VOCABULARY.first_code("image")
                    before, after = (
                        int(is_image[:end].sum()) for end in (start, start + int(plan.slots[piece]))
                    )
                    vectors += own[before:after]
                    for i in range(int(plan.slots[piece])):
                        at = start + i
                        found = [getattr(batch, name)[row, slot] for name in ("input_ids", "target_ids")]
                        assert found == [ids[at], ids[at + 1]]
                        assert batch.document_ids[row, slot] == number and batch.positions[row, slot] == i
                        assert batch.loss_weights[row, slot] == 1
                        slot += 1
                assert batch.vectors["image"].rows(row, row + 1).values.tolist() == vectors
                of_images += len(vectors)
                assert (batch.document_ids[row, slot:] == -1).all() and not batch.loss_weights[
                    row, slot:
                ].any()
    assert continued >= 2, "second and later pieces of long documents are among them"
    assert of_images >= 100


def test_what_a_step_says_of_itself(stream: Stream) -> None:
    with Loader(stream, dp_rank=0, dp_size=2, micro_batch_sequences=3) as loader:
        first, second = loader.next_step(), loader.next_step()
    assert [batch.num_sequences for batch in first.micro_batches] == [3, 3]
    plan, after = stream.plan_step(stream.start())
    assert first.fill_frac == plan.filled_slots / (STEP_SEQUENCES * CONTEXT) <= 1
    assert first.state_after == after and first.wait_s > 0 and first.unreadable == ()
    assert first.epochs == stream.epochs(after)
    assert all(0 < a <= b for a, b in zip(first.epochs, second.epochs, strict=True))


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_the_state_moves_with_what_is_taken_not_with_what_is_read_ahead(
    stream: Stream, reference: tuple, prefetch_steps: int
) -> None:
    loader = Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=1, prefetch_steps=prefetch_steps)
    with loader:
        assert loader.state == stream.start()
        for expected in reference[1][:3]:
            loader.next_step()
            assert loader.state == expected
    again = steps(stream, 3, prefetch_steps, 4, state=StreamState.from_json(loader.state.to_json()))
    assert again == (reference[0][3:7], reference[1][3:7])


def test_another_global_batch_goes_on_where_the_last_one_stopped(
    folders: list[Path], reference: tuple
) -> None:
    pairs = [(TokenSource.open(folder), weight) for folder, weight in zip(folders, (0.6, 0.4), strict=True)]
    larger = Stream(pairs, seed=1, context_tokens=CONTEXT, sequences_per_step=24)
    with Loader(larger, dp_rank=0, dp_size=1, micro_batch_sequences=24, state=reference[1][2]) as loader:
        step = loader.next_step()
    assert local_digests(step) == reference[0][3] + reference[0][4]
    assert step.state_after == reference[1][4]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_random_numbers_of_the_training_are_left_alone(stream: Stream, prefetch_steps: int) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with Loader(
        stream, dp_rank=0, dp_size=1, micro_batch_sequences=1, prefetch_steps=prefetch_steps
    ) as loader:
        loader.next_step()
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(("dp_size", "micro"), [(5, 1), (1, 5), (4, 2), (0, 1), (1, 0), (24, 1)])
def test_a_step_that_does_not_divide_is_refused(stream: Stream, dp_size: int, micro: int) -> None:
    with pytest.raises(
        ConfigError, match=rf"12 sequences per step do not divide into {dp_size} data-parallel"
    ):
        Loader(stream, dp_rank=0, dp_size=dp_size, micro_batch_sequences=micro)


def test_a_rank_that_is_none_and_a_foreign_state_are_refused(stream: Stream, folders: list[Path]) -> None:
    with pytest.raises(ConfigError, match=r"dp_rank = 2: legal are 0 \.\.\. 1"):
        Loader(stream, dp_rank=2, dp_size=2, micro_batch_sequences=1)
    with pytest.raises(ConfigError, match="sources, but the saved stream has 1"):
        state = stream_of(folders[:1]).start()
        Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=1, state=state)


# faults while reading


def _damage(folder: Path, documents: list[int]) -> list[str]:
    """Change a vector of each of `documents` on disk, or an id where it has none; their names."""
    source = TokenSource.open(folder)
    for document in documents:
        path = folder / f"tokens-{document // 40:05d}.tar"
        data = bytearray(path.read_bytes())
        vectors, _ = source.vectors_place(document)
        data[vectors or int(source.index.offset[document]) + 2] ^= 1
        path.write_bytes(data)
    return [f"tokens-{d // 40:05d}.tar/{d:09d}" for d in documents]


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_damaged_document_becomes_padding_and_nothing_else_moves(
    tmp_path: Path, prefetch_steps: int
) -> None:
    folder = write(tmp_path / "a", 100, 1)
    clean = stream_of([folder])
    with Loader(clean, dp_rank=0, dp_size=1, micro_batch_sequences=12) as loader:
        expected = [loader.next_step() for _ in range(6)]
    names = _damage(folder, [17, 62])  # the second has vectors
    with Loader(
        stream_of([folder]), dp_rank=0, dp_size=1, micro_batch_sequences=12, prefetch_steps=prefetch_steps
    ) as loader:
        found = [loader.next_step() for _ in range(6)]
    assert [step.state_after for step in found] == [step.state_after for step in expected]
    assert [step.fill_frac for step in found] == [step.fill_frac for step in expected]
    affected = 0
    for ours, theirs in zip(found, expected, strict=True):
        (a,), (b,) = ours.micro_batches, theirs.micro_batches
        reported = []
        for row in range(12):
            bad = [i for i, name in enumerate(b.samples[row]) if name in names]
            if not bad:
                assert digest(a, row) == digest(b, row)
                continue
            affected += 1
            reported += [b.samples[row][i] for i in bad]
            keep = ~np.isin(b.document_ids[row], [*bad, -1])
            kept = int(keep.sum())
            assert np.array_equal(a.input_ids[row, :kept], b.input_ids[row, keep])
            assert np.array_equal(a.target_ids[row, :kept], b.target_ids[row, keep])
            assert np.array_equal(a.positions[row, :kept], b.positions[row, keep])
            assert not a.loss_weights[row, kept:].any() and (a.document_ids[row, kept:] == -1).all()
            assert a.samples[row] == tuple(name for name in b.samples[row] if name not in names)
        assert list(ours.unreadable) == [f"{folder}/{name}" for name in reported]
        assert (ours.digest == theirs.digest) == (not reported)
    assert affected >= 2


def test_more_unreadable_documents_than_allowed_are_an_error() -> None:
    names = ["a/tokens-00000.tar/000000001", "a/tokens-00000.tar/000000002"]
    check_readable([], 160, 0.0)
    check_readable(names, 160, 2 / 160)
    with pytest.raises(
        WrongChecksum, match=r"tar/000000002: cannot be read .*frac = 0\.01 allows 1 of 160 d"
    ):
        check_readable(names, 160, 0.01)
    with pytest.raises(WrongChecksum, match=r"tar/000000002, x \(and 1 more\): .*frac = 0 allows 0 of 160"):
        check_readable([*names, "x", "y"], 160, 0.0)


def test_a_stage_of_webdataset_ends_with_the_first_unreadable_document(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", 100, 1)
    stream = stream_of([folder])
    _damage(folder, list(range(10)))
    with pytest.raises(WrongChecksum, match=r"a/tokens-00000\.tar/00000000\d.* cannot be read as indexed"):
        for _ in zip(range(100), sequences(stream)(), strict=False):
            pass


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_a_shard_that_vanishes_is_named(tmp_path: Path, prefetch_steps: int) -> None:
    folder = write(tmp_path / "a", 100, 1)
    stream = stream_of([folder])
    (folder / "tokens-00001.tar").unlink()
    with (
        Loader(
            stream, dp_rank=0, dp_size=1, micro_batch_sequences=12, prefetch_steps=prefetch_steps
        ) as loader,
        pytest.raises(ShardError, match=r"^.+tokens-00001\.tar: missing, but listed in .+manifest\.json"),
    ):
        for _ in range(10):
            loader.next_step()


# the thread that reads ahead


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("read data")}


def _loader(stream: Stream, **options: Any) -> Loader:
    return Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=4, **options)


def test_inputs_are_prepared_once_per_micro_batch_in_the_thread(stream: Stream, reference: tuple) -> None:
    threads = set()

    def prepare(batch: Batch) -> list[str]:
        threads.add(threading.current_thread().name)
        return [digest(batch, row) for row in range(batch.num_sequences)]

    with _loader(stream, prefetch_steps=2, prepare=prepare) as loader:
        for expected in reference[0][:5]:
            step = loader.next_step()
            assert [each for inputs in step.inputs for each in inputs] == expected == local_digests(step)
    assert threads == {"read data_0"}


@pytest.mark.parametrize("prefetch_steps", [1, 3])
def test_the_thread_is_no_further_ahead_than_asked(stream: Stream, prefetch_steps: int) -> None:
    prepared: list[Batch] = []
    with _loader(stream, prefetch_steps=prefetch_steps, prepare=prepared.append) as loader:
        for _ in range(5):
            loader.next_step()
    assert 5 * 3 <= len(prepared) <= (5 + prefetch_steps) * 3


@pytest.mark.parametrize("prefetch_steps", [0, 2])
def test_an_error_is_raised_as_it_is_at_its_step_and_again(
    stream: Stream, reference: tuple, prefetch_steps: int
) -> None:
    def prepare(batch: Batch) -> None:
        if digest(batch, 0) == reference[0][3][0]:
            raise RuntimeError("a bug of ours")

    with _loader(stream, prefetch_steps=prefetch_steps, prepare=prepare) as loader:
        for _ in range(3):
            loader.next_step()
        for _ in range(4):
            with pytest.raises(RuntimeError, match=r"^a bug of ours$"):
                loader.next_step()
        assert loader.state == reference[1][2]
    assert not _threads()


def test_an_error_that_passes_is_followed_by_the_step_it_was_raised_at(
    stream: Stream, reference: tuple
) -> None:
    left = [OSError("stale file handle")]

    def prepare(batch: Batch) -> None:
        if digest(batch, 0) == reference[0][2][0] and left:
            raise left.pop()

    with _loader(stream, prefetch_steps=3, prepare=prepare) as loader:
        found = [local_digests(loader.next_step()) for _ in range(2)]
        with pytest.raises(OSError, match="stale"):
            loader.next_step()
        found += [local_digests(loader.next_step()) for _ in range(4)]
    assert found == reference[0][:6]


def test_close_leaves_no_thread_and_may_be_called_twice(stream: Stream) -> None:
    loader = _loader(stream, prefetch_steps=2)
    loader.next_step()
    assert len(_threads()) == 1
    loader.close()
    loader.close()
    assert not _threads()


def test_an_exception_in_the_loop_leaves_no_thread(stream: Stream) -> None:
    with pytest.raises(ZeroDivisionError), _loader(stream, prefetch_steps=2) as loader:
        loader.next_step()
        raise ZeroDivisionError
    assert not _threads()


def test_reading_in_the_calling_thread_starts_none(stream: Stream) -> None:
    with _loader(stream, prefetch_steps=0) as loader:
        loader.next_step()
        assert not _threads()


PROGRAM = """
import signal, sys, time
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream

stream = Stream([(TokenSource.open(sys.argv[1]), 1.0)], seed=1, context_tokens=64, sequences_per_step=12)
loader = Loader(stream, dp_rank=0, dp_size=1, micro_batch_sequences=12, prefetch_steps=3)
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
loader.next_step()
print("reads", flush=True)
while sys.argv[2] == "signal" and not asked:
    loader.next_step()
if sys.argv[2] == "error":
    raise SystemExit(3)
print("ends", flush=True)
"""


@pytest.mark.parametrize(
    ("way", "code", "printed"), [("end", 0, "ends\n"), ("signal", 0, "ends\n"), ("error", 3, "")]
)
def test_a_process_that_does_not_close_its_loader_ends(
    folders: list[Path], way: str, code: int, printed: str
) -> None:
    command = [sys.executable, "-c", PROGRAM, str(folders[0]), way]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3]
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "reads\n"
        if way == "signal":
            os.kill(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) == code
        assert process.stdout.read() == printed


# as a stage of a webdataset pipeline


def test_sequences_start_a_webdataset_pipeline(stream: Stream, reference: tuple) -> None:
    pipeline = wds.DataPipeline(
        sequences(stream, dp_rank=1, dp_size=3, state=reference[1][0]),
        wds.map(lambda sample: {**sample, "tokens": int(sample["loss_weights"].sum())}),
    )
    found = [sample for sample, _ in zip(pipeline, range(8), strict=False)]
    assert [int(sample["__key__"]) for sample in found] == list(range(12 + 1, 12 + 1 + 3 * 8, 3))
    with Loader(stream, dp_rank=1, dp_size=3, micro_batch_sequences=4, state=reference[1][0]) as loader:
        batches = [loader.next_step().micro_batches[0] for _ in range(2)]
    for i, sample in enumerate(found):
        batch = batches[i // 4]
        assert np.array_equal(sample["input_ids"], batch.input_ids[i % 4]) and sample["input_ids"].shape == (
            64,
        )
        assert sample["samples"] == batch.samples[i % 4]
        assert sample["tokens"] == batch.loss_weights[i % 4].sum()


def test_sequences_in_several_workers_are_refused(stream: Stream) -> None:
    pipeline = wds.DataPipeline(sequences(stream))
    loader = torch.utils.data.DataLoader(
        pipeline, batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    with pytest.raises(ConfigError, match="more than one worker would repeat"):
        next(iter(loader))
