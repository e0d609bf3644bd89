from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_document, random_documents, write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.fingerprint import (
    UNREADABLE,
    chain,
    piece_weights,
    sequence_weights,
    step_digest,
)
from data_pipeline.stream.loader import Loader
from data_pipeline.stream.stream import Stream

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
CONTEXT = 64
STEP_SEQUENCES = 12


def documents(count: int = 90) -> list[np.ndarray]:
    return list(random_documents(VOCABULARY, count, 0, median_text_tokens=10, image_tokens=9))


def write(folder: Path, ids: list[np.ndarray]) -> Path:
    return write_token_folder(folder, ids, VOCABULARY, documents_per_shard=40)


def read(
    folder: Path, steps: int, *, dp_size: int = 1, step: int = STEP_SEQUENCES, seed: int = 1
) -> list[int]:
    """The fingerprint after each step, read by `dp_size` loaders."""
    stream = Stream(
        [(TokenSource.open(folder), 1.0)], seed=seed, context_tokens=CONTEXT, sequences_per_step=step
    )
    loaders = [
        Loader(stream, dp_rank=r, dp_size=dp_size, micro_batch_sequences=1, prefetch_steps=0)
        for r in range(dp_size)
    ]
    found = [0]
    for _ in range(steps):
        digest = sum(loader.next_step().digest for loader in loaders)
        found.append(chain(found[-1], digest, step))
    return found[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"), documents())


@pytest.fixture(scope="module")
def reference(folder: Path) -> list[int]:
    return read(folder, 8)


@pytest.mark.parametrize("dp_size", [2, 3, 12])
def test_it_does_not_depend_on_the_number_of_ranks(folder: Path, reference: list[int], dp_size: int) -> None:
    assert read(folder, 8, dp_size=dp_size) == reference


def test_it_does_not_depend_on_the_sequences_of_a_step(folder: Path, reference: list[int]) -> None:
    assert read(folder, 4, step=24)[-1] == read(folder, 32, step=3)[-1] == reference[-1]


@given(st.lists(st.lists(st.integers(0, UNREADABLE), max_size=4), min_size=1, max_size=20))
def test_a_step_is_the_chain_of_its_sequences(step: list[list[int]]) -> None:
    contents = [np.array(sequence, np.uint64) for sequence in step]
    of_pieces = [weights(len(sequence)) for sequence in step]
    counts, of_sequences = np.array([len(sequence) for sequence in step]), sequence_weights(len(step))
    one_by_one = 7
    for content, weight, count in zip(contents, of_pieces, counts, strict=True):
        digest = step_digest(content, weight, sequence_weights(1), np.array([count]))
        one_by_one = chain(one_by_one, digest, 1)
    parts = [
        step_digest(
            np.concatenate([*contents[r::3], np.zeros(0, np.uint64)]),
            np.concatenate([*of_pieces[r::3], np.zeros(0, np.uint64)]),
            of_sequences[r::3],
            counts[r::3],
        )
        for r in range(3)
    ]
    assert chain(7, sum(parts), len(step)) == one_by_one


def weights(count: int) -> np.ndarray:
    """Of the pieces of a sequence of whole documents of 9 slots."""
    return piece_weights(np.zeros(count, np.int64), np.full(count, 9), np.arange(count))


def test_weights_are_odd_and_differ_by_document_length_start_and_place() -> None:
    base = np.zeros(1, np.int64)
    found = {
        int(piece_weights(base + a, base + b, base + c)[0]) for a in (0, 1) for b in (8, 9) for c in (0, 1)
    }
    assert len(found) == 8 and all(weight % 2 for weight in found)


def test_it_tells_of_content_not_of_place(tmp_path: Path, reference: list[int]) -> None:
    changed = documents()
    changed[5] = np.where(np.arange(len(changed[5])) == 1, 299, changed[5]).astype(np.uint16)
    assert read(write(tmp_path / "copy", documents()), 8) == reference
    assert read(write(tmp_path / "changed", changed), 8)[-1] != reference[-1]


def test_it_tells_the_pieces_of_a_document_apart(tmp_path: Path) -> None:
    ids = random_document(np.random.default_rng(0), VOCABULARY, [("text", 2 * CONTEXT - 1)])
    folder = write(tmp_path, [ids])
    # In some seeds the first piece comes first, in the others the second one.
    assert len({read(folder, 1, step=2, seed=seed)[0] for seed in range(8)}) == 2


def _overwrite(folder: Path, document: int, content: bytes) -> None:
    """Overwrite the beginning of a document on disk, whose index stays."""
    source = TokenSource.open(folder)
    with open(folder / f"tokens-{document // 40:05d}.tar", "r+b") as file:
        file.seek(int(source.index.offset[document]))
        file.write(content)


def test_it_is_of_what_was_read_and_not_of_the_index(tmp_path: Path, reference: list[int]) -> None:
    """A document that cannot be read is in it as such: as padding, whatever bytes stand there."""
    folder = write(tmp_path, documents())
    _overwrite(folder, 5, b"\0\0\0")
    damaged = read(folder, 8)
    assert damaged[-1] != reference[-1]
    _overwrite(folder, 5, b"\7\7\7")
    assert read(folder, 8) == damaged
    _overwrite(folder, 6, b"\0\0\0")
    assert read(folder, 8)[-1] not in (damaged[-1], reference[-1])
    _overwrite(folder, 5, documents()[5].tobytes())
    _overwrite(folder, 6, documents()[6].tobytes())
    assert read(folder, 8) == reference


def test_a_shard_whose_end_is_zeros_is_not_the_shard(tmp_path: Path, reference: list[int]) -> None:
    folder = write(tmp_path, documents())
    TokenSource.open(folder)
    path = folder / "tokens-00001.tar"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    assert read(folder, 8)[-1] != reference[-1]
