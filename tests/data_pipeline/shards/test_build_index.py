import hashlib
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.build_index import index_shard
from data_pipeline.shards.faults import BadDocument, TruncatedShard, WrongChecksum
from data_pipeline.shards.loss_mask import to_bytes
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.synthetic import random_document, random_documents
from data_pipeline.shards.tar import write_shard
from data_pipeline.shards.vocabulary import BOI, BOS, EOI, EOS, VectorFormat, Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
GOOD = np.array([BOS, 9, BOI, 301, EOI, EOS], np.uint16)


def write(folder: Path, documents: list[np.ndarray]) -> tuple[Path, dict[str, Any]]:
    path = folder / "tokens-00000.tar"
    samples = [(str(i), {"ids": ids.astype(np.uint16).tobytes()}) for i, ids in enumerate(documents)]
    return path, write_shard(path, samples)


def test_place_length_checksum_and_spans_of_every_document(tmp_path: Path) -> None:
    documents = list(random_documents(VOCABULARY, 50, 0, median_text_tokens=8, image_tokens=5))
    path, entry = write(tmp_path, documents)
    found = index_shard(path, entry, VOCABULARY)
    data, row = path.read_bytes(), 0
    for i, ids in enumerate(documents):
        content = data[int(found["offset"][i]) :][: ids.nbytes]
        assert content == ids.tobytes() and found["length"][i] == len(ids)
        assert found["crc32"][i] == zlib.crc32(content)
        spans = [[p.start, p.end] for p in read_spans(ids, VOCABULARY) if p.modality != "text"]
        assert found["num_spans"][i] == len(spans)
        assert found["span"][row : row + len(spans)].tolist() == spans
        row += len(spans)
    assert row == len(found["span"])


def test_documents_of_more_ids_than_are_checked_at_once(tmp_path: Path) -> None:
    """Groups of documents of 4 M ids, and a document longer than that, have their own spans."""
    rng = np.random.default_rng(0)
    documents = [
        random_document(rng, VOCABULARY, [("text", text), ("image", 9), ("text", 2)])
        for text in (5, 3_000_000, 2_000_000, 5_000_000, 7)
    ]
    found = index_shard(*write(tmp_path, documents), VOCABULARY)
    assert found["length"].tolist() == [len(ids) for ids in documents]
    assert found["num_spans"].tolist() == [1] * 5
    assert found["span"].tolist() == [[1 + n, 1 + n + 11] for n in (5, 3_000_000, 2_000_000, 5_000_000, 7)]


def test_a_shard_of_nothing(tmp_path: Path) -> None:
    found = index_shard(*write(tmp_path, []), VOCABULARY)
    assert {name: array.shape for name, array in found.items()} == {
        "offset": (0,), "length": (0,), "crc32": (0,), "num_spans": (0,), "span": (0, 2),
        "num_masked": (0,), "masked": (0, 2), "vectors_offset": (0,), "vectors_crc32": (0,),
    }  # fmt: skip


def test_a_wrong_checksum(tmp_path: Path) -> None:
    path, entry = write(tmp_path, [GOOD])
    with pytest.raises(WrongChecksum, match=r"tokens-00000\.tar: sha256 \w+, but manifest\.json says 00ff"):
        index_shard(path, entry | {"sha256": "00ff"}, VOCABULARY)


@pytest.mark.parametrize("end", [0, 100])
def test_a_tar_that_was_written_without_its_end(tmp_path: Path, end: int) -> None:
    path, _ = write(tmp_path, [GOOD, GOOD])
    path.write_bytes(path.read_bytes()[: 4 * 512] + b"\0" * end)  # two headers, two contents
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(TruncatedShard, match=r"tokens-00000\.tar: ends without an end-of-archive mark"):
        index_shard(path, {"sha256": sha256}, VOCABULARY)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([BOS, 396, EOS], "id 396 at position 1 is not in the vocabulary of 396 ids"),
        ([BOS, 8, BOI, 300, EOS], "do not pair up at position 2"),
        ([BOS, 300, EOS], "an id of image at position 1"),
        ([BOS, 9], "does not start with <bos> and end with <eos>"),
        ([9, EOS], "does not start with <bos> and end with <eos>"),
        ([BOS], "has fewer than two ids"),
    ],
)
def test_a_document_that_is_none_is_named(tmp_path: Path, ids: list[int], message: str) -> None:
    path, entry = write(tmp_path, [GOOD, GOOD, np.array(ids), GOOD])
    with pytest.raises(BadDocument, match=rf"tokens-00000\.tar: 2\.ids:? .*{message}"):
        index_shard(path, entry, VOCABULARY)


def test_a_span_over_the_border_of_two_documents(tmp_path: Path) -> None:
    # each begins and ends well, and delimiters pair up over both
    path, entry = write(tmp_path, [np.array([BOS, BOI, EOS]), np.array([BOS, EOI, EOS])])
    with pytest.raises(BadDocument, match=r"0\.ids: delimiters of spans do not pair up"):
        index_shard(path, entry, VOCABULARY)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("txt", b"hello", 'holds "0.txt"; a token shard has .ids files, and behind'),
        ("ids", b"abc", "holds 3 bytes"),
    ],
)
def test_a_foreign_file_and_an_odd_size(tmp_path: Path, suffix: str, content: bytes, message: str) -> None:
    path = tmp_path / "tokens-00000.tar"
    entry = write_shard(path, [("0", {suffix: content})])
    with pytest.raises(BadDocument, match=message):
        index_shard(path, entry, VOCABULARY)


def test_masked_ranges_stand_behind_the_ids_of_their_document(tmp_path: Path) -> None:
    path, ranges = tmp_path / "tokens-00000.tar", np.array([[1, 2], [4, 5]])
    plain, masked = {"ids": GOOD.tobytes()}, {"ids": GOOD.tobytes(), "masked": to_bytes(ranges)}
    found = index_shard(path, write_shard(path, [("0", plain), ("1", masked), ("2", plain)]), VOCABULARY)
    assert found["num_masked"].tolist() == [0, 2, 0] and found["masked"].tolist() == ranges.tolist()
    assert found["length"].tolist() == [6, 6, 6]
    for samples, message in (
        ([("0", {"ids": GOOD.tobytes(), "masked": to_bytes(ranges + 1)})], r"0\.ids: its \.masked: ranges"),
        ([("0", plain), ("1", {"masked": to_bytes(ranges)})], r'holds "1\.masked"'),
        ([("0", {"masked": to_bytes(ranges), "ids": GOOD.tobytes()})], r'holds "0\.masked"'),
    ):
        with pytest.raises(BadDocument, match=message):
            index_shard(path, write_shard(path, samples), VOCABULARY)


def test_vectors_stand_behind_the_ids_that_ask_for_them(tmp_path: Path) -> None:
    path, of = tmp_path / "tokens-00000.tar", VectorFormat(features=2, dtype="float16")
    vocabulary = Vocabulary(sizes={"text": 300, "image": 1}, vectors={"image": of})
    ids, ranges = np.array([BOS, 9, BOI, 300, 300, EOI, EOS], np.uint16).tobytes(), np.array([[1, 2]])
    vectors, text = np.arange(4, dtype=np.float16), {"ids": np.array([BOS, 9, EOS], np.uint16).tobytes()}
    whole = {"ids": ids, "masked": to_bytes(ranges), "vectors": vectors.tobytes()}
    found = index_shard(path, write_shard(path, [("0", text), ("1", whole), ("2", text)]), vocabulary)
    place = int(found["vectors_offset"][1])
    assert path.read_bytes()[place : place + 8] == vectors.tobytes()
    assert found["vectors_offset"].tolist() == [0, place, 0]
    assert found["vectors_crc32"].tolist() == [0, zlib.crc32(vectors.tobytes()), 0]
    endless = np.array([0, 0, 0, np.inf], np.float16).tobytes()
    for samples, message in (
        ([("0", whole | {"vectors": bytes(6)})], r"0\.ids: its \.vectors: 6 bytes, but .*'image': 2.*: 8 b"),
        ([("0", {"ids": ids})], r"0\.ids: its \.vectors: 0 bytes"),
        ([("0", text | {"vectors": bytes(8)})], r"0\.ids: its \.vectors: 8 bytes"),
        ([("0", {"ids": ids, "vectors": endless})], r"0\.ids: a vector of image is not finite"),
        ([("0", text), ("1", {"vectors": bytes(8)})], r'holds "1\.vectors"'),
        ([("0", whole), ("0", {"vectors": bytes(8)})], r'holds "0\.vectors"'),
        ([("0", {"ids": ids, "vectors": bytes(8), "masked": to_bytes(ranges)})], r'holds "0\.masked"'),
    ):
        with pytest.raises(BadDocument, match=message):
            index_shard(path, write_shard(path, samples), vocabulary)
    with pytest.raises(BadDocument, match=r"1\.ids: has a \.vectors, but manifest\.json names no modality"):
        index_shard(path, write_shard(path, [("0", text), ("1", whole)]), Vocabulary(sizes=vocabulary.sizes))


def test_names_are_shown_escaped_and_sizes_are_octal(tmp_path: Path) -> None:
    path = tmp_path / "tokens-00000.tar"
    entry = write_shard(path, [("a\x1b[2J\nb", {"txt": b""})])
    with pytest.raises(BadDocument, match=r'holds "a\\x1b\[2J\\nb\.txt"'):
        index_shard(path, entry, VOCABULARY)
    content = bytearray(path.read_bytes())
    content[124:136] = b"-0000000999\0"
    path.write_bytes(content)
    entry["sha256"] = hashlib.sha256(content).hexdigest()
    with pytest.raises(BadDocument, match="the tar header at byte 0 holds no size"):
        index_shard(path, entry, VOCABULARY)
