import multiprocessing
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.atomic import write_json
from data_pipeline.shards.faults import BadDocument, MissingShard, TruncatedShard, WrongChecksum
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.index_file import INDEX
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.synthetic import random_documents, write_token_folder
from data_pipeline.shards.tar import MANIFEST, ShardError, write_shard
from data_pipeline.shards.vocabulary import BOS, EOS, VectorFormat, Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})
OF_VECTORS = Vocabulary(
    sizes={"text": 300, "image": 1, "speech": 32},
    vectors={"image": VectorFormat(features=12, dtype="uint8", mean=120.0, std=60.0)},
)


def documents(count: int = 60, seed: int = 0) -> list[np.ndarray]:
    return list(random_documents(VOCABULARY, count, seed, median_text_tokens=8, image_tokens=5))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    return write_token_folder(folder, documents(), VOCABULARY, documents_per_shard=25)


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    """A copy to damage, without an index."""
    shutil.copytree(written, tmp_path / "tokens", ignore=shutil.ignore_patterns(INDEX))
    return tmp_path / "tokens"


def test_every_document_can_be_read_in_any_order_with_its_name_length_and_spans(written: Path) -> None:
    source = TokenSource.open(written)
    expected = documents()
    assert source.num_documents == len(expected) == 60
    assert source.vocabulary == VOCABULARY
    assert source.lengths.tolist() == [len(ids) for ids in expected]
    for i in np.random.default_rng(0).permutation(60):
        assert np.array_equal(source.read(i), expected[i]) and source.read(i).dtype == np.uint16
        assert source.name(i) == f"tokens-{i // 25:05d}.tar/{i:09d}"
        parts = read_spans(expected[i], VOCABULARY)
        assert source.spans(i).tolist() == [[p.start, p.end] for p in parts if p.modality != "text"]
    spans = np.concatenate([source.spans(i) for i in range(60)])
    assert source.longest_span_tokens == (spans[:, 1] - spans[:, 0]).max() > 5


def test_the_index_is_made_once_and_says_the_same_wherever_it_is_made(folder: Path, tmp_path: Path) -> None:
    first = TokenSource.open(folder)
    made = (folder / INDEX).stat()
    again = TokenSource.open(folder)
    now = (folder / INDEX).stat()
    assert (made.st_ino, made.st_mtime_ns) == (now.st_ino, now.st_mtime_ns)
    elsewhere = write_token_folder(tmp_path / "elsewhere", documents(), VOCABULARY, documents_per_shard=25)
    assert first.index_hash == again.index_hash == TokenSource.open(elsewhere).index_hash
    assert sorted(path.name for path in folder.iterdir()) == [
        INDEX,
        MANIFEST,
        *(f"tokens-{i:05d}.tar" for i in range(3)),
    ]


def test_it_is_made_again_for_other_shards_and_then_has_another_hash(folder: Path) -> None:
    before = TokenSource.open(folder)
    write_token_folder(folder, documents(seed=1), VOCABULARY, documents_per_shard=25)
    after = TokenSource.open(folder)
    assert after.index_hash != before.index_hash
    assert np.array_equal(after.read(7), documents(seed=1)[7])


def test_masked_ranges_are_in_the_index_where_there_are_some(folder: Path, tmp_path: Path) -> None:
    plain, ranges = TokenSource.open(folder), np.array([[1, 3]])
    header = (folder / "index.bin").read_bytes()[16:].partition(b"}}")[0]
    assert b"masked" not in header and not plain.has_masks and len(plain.masked(7)) == 0
    write_token_folder(tmp_path / "m", documents(), VOCABULARY, documents_per_shard=25, masked={7: ranges})
    source = TokenSource.open(tmp_path / "m")
    assert source.masked(7).tolist() == ranges.tolist() and len(source.masked(8)) == 0
    assert source.index_hash != plain.index_hash and np.array_equal(source.read(7), plain.read(7))
    crc32 = [[each.fetch(number)[2] for number in (7, 8)] for each in (source, plain)]
    assert crc32[0][0] != crc32[1][0] and crc32[0][1] == crc32[1][1], "what was read covers the ranges"
    first, second = ((each / "tokens-00001.tar").read_bytes() for each in (folder, tmp_path / "m"))
    assert first == second, "a shard without context is byte for byte what it was"


def test_folders_of_ids_have_the_index_that_they_always_had(tmp_path: Path) -> None:
    """The hash and the checksums are those of the version before vectors: runs on such folders go on."""
    ids = [np.array([1, 9, 3, 300, 301, 4, 2]), np.array([1, 8, 2])]
    write_token_folder(tmp_path, ids, VOCABULARY, documents_per_shard=1, masked={0: np.array([[2, 6]])})
    source = TokenSource.open(tmp_path)
    assert source.index_hash == "3bb03e067332f518ef0eee1483533f0801f0ea63a0639e33820485959a83b113"
    assert [source.fetch(number)[2] for number in range(2)] == [4093575004, 2367436907]


def test_vectors_are_read_beside_their_ids_and_checked_like_them(tmp_path: Path) -> None:
    of = list(random_documents(OF_VECTORS, 60, 0, median_text_tokens=8, image_tokens=5))
    images = [int((ids == OF_VECTORS.first_code("image")).sum()) for ids in of]
    first, last = (i for i in (images.index(5), len(images) - 1 - images[::-1].index(5)))
    vectors = [{"image": np.full((n, 12), number, np.uint8)} for number, n in enumerate(images)]
    masked = {first: np.array([[1, 3]])}
    for name, changed in (("a", vectors), ("b", [*vectors[:last], {"image": vectors[last]["image"] + 1}])):
        changed = [*changed, *vectors[len(changed) :]]
        write_token_folder(
            tmp_path / name, of, OF_VECTORS, documents_per_shard=25, vectors=changed, masked=masked
        )
    source, other = TokenSource.open(tmp_path / "a"), TokenSource.open(tmp_path / "b")
    assert source.vocabulary == OF_VECTORS and 0 < images.count(0) < 60
    for number in range(60):
        content = source.document(number)
        assert (
            np.array_equal(content.ids, of[number]) and content.ids.tolist() == source.read(number).tolist()
        )
        assert np.array_equal(content.vectors["image"], vectors[number]["image"])
    differ = [source.fetch(i)[2] != other.fetch(i)[2] for i in range(60)]
    assert differ == [i == last for i in range(60)], "what was read covers the vectors"
    assert source.fetch(images.index(0))[2] == source.index.crc32[images.index(0)]
    assert source.index.vectors_offset is not None
    _flip(tmp_path / "a" / f"tokens-{first // 25:05d}.tar", int(source.index.vectors_offset[first]) + 59)
    assert source.fetch(first)[1] is None and source.fetch(last)[1] is not None
    with pytest.raises(WrongChecksum, match=f"{first:09d} does not match the index"):
        source.document(first)


def test_a_folder_without_images_has_no_arrays_of_vectors(tmp_path: Path) -> None:
    texts = [np.array([BOS, 9, 9 + i, EOS]) for i in range(3)]
    source = TokenSource.open(write_token_folder(tmp_path, texts, OF_VECTORS, documents_per_shard=2))
    assert source.index.vectors_offset is None and source.document(2).vectors["image"].shape == (0, 12)


def test_another_tokenizer_is_another_hash(tmp_path: Path) -> None:
    hashes = {
        TokenSource.open(
            write_token_folder(
                tmp_path / name, documents(), VOCABULARY, documents_per_shard=25, fingerprint=name
            )
        ).index_hash
        for name in ("one", "two")
    }
    assert len(hashes) == 2


def _open_and_hash(folder: Path, results: "multiprocessing.SimpleQueue[str]") -> None:
    results.put(TokenSource.open(folder).index_hash)


def test_processes_that_open_a_folder_at_once_find_one_whole_index(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    ranks = [context.Process(target=_open_and_hash, args=(folder, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert len({results.get() for _ in ranks}) == 1
    assert not list(folder.glob("*.tmp"))


def test_text_only_long_names_an_empty_shard_and_wide_ids(tmp_path: Path) -> None:
    ids = np.array([BOS, 69_999, 12, EOS], np.uint32)
    keys = ["a" * 96, "books/" + "b" * 90 + "/" + "c" * 90]
    shards = [
        write_shard(tmp_path / "tokens-00000.tar", []),
        write_shard(tmp_path / "tokens-00001.tar", [(key, {"ids": ids.tobytes()}) for key in keys]),
    ]
    manifest = {"format": 1, "vocabulary": {"text": 70_000}, "tokenizers": {}, "shards": shards}
    write_json(tmp_path / MANIFEST, manifest)
    source = TokenSource.open(tmp_path)
    assert [source.name(i) for i in range(2)] == [f"tokens-00001.tar/{key}" for key in keys]
    assert source.read(1).tolist() == ids.tolist()
    assert source.spans(0).shape == (0, 2) and source.longest_span_tokens == 0


def test_more_shards_than_files_may_be_open(tmp_path: Path) -> None:
    write_token_folder(tmp_path, documents(300), VOCABULARY, documents_per_shard=1)
    source = TokenSource.open(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    expected = documents(300)
    for i in [*range(300), 0, 299]:
        assert np.array_equal(source.read(i), expected[i])
    assert len(os.listdir("/proc/self/fd")) - before <= 128
    del source
    assert len(os.listdir("/proc/self/fd")) - before <= 0


# each fault its own error, which names the file and what to do


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no manifest\.json"):
        TokenSource.open(tmp_path)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_missing_shard(folder: Path, indexed: bool) -> None:
    if indexed:
        TokenSource.open(folder)
    (folder / "tokens-00001.tar").unlink()
    with pytest.raises(
        MissingShard, match=r"tokens-00001\.tar: missing, but listed in .*manifest.json; copy"
    ):
        TokenSource.open(folder)


@pytest.mark.parametrize("indexed", [False, True])
def test_a_truncated_tar(folder: Path, indexed: bool) -> None:
    if indexed:
        TokenSource.open(folder)
    path = folder / "tokens-00001.tar"
    os.truncate(path, path.stat().st_size - 1000)
    with pytest.raises(
        TruncatedShard, match=r"tokens-00001\.tar: truncated, \d+ bytes where manifest.json says"
    ):
        TokenSource.open(folder)


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_wrong_checksum_of_a_shard(folder: Path) -> None:
    _flip(folder / "tokens-00002.tar", 514)
    with pytest.raises(WrongChecksum, match=r"tokens-00002\.tar: sha256 \w+, but manifest.json says"):
        TokenSource.open(folder)


def test_a_document_that_was_damaged_after_indexing(folder: Path) -> None:
    source = TokenSource.open(folder)
    _flip(folder / "tokens-00001.tar", int(source.index.offset[30]) + 2)
    with pytest.raises(WrongChecksum, match=r"tokens-00001\.tar/000000030 does not match the index"):
        source.read(30)
    name, content, crc32 = source.fetch(30)
    assert (name, content) == ("tokens-00001.tar/000000030", None)
    assert crc32 != source.index.crc32[30] and source.fetch(31)[2] == source.index.crc32[31]
    assert np.array_equal(source.read(31), documents()[31]), "the others can still be read"


@pytest.mark.parametrize("content", [b"\0", b"\x1b[2J"])
def test_a_document_whose_key_is_damaged_too_is_named_by_its_number(folder: Path, content: bytes) -> None:
    source = TokenSource.open(folder)
    path, start = folder / "tokens-00001.tar", int(source.index.offset[30]) - 512
    data = bytearray(path.read_bytes())
    data[start:] = (content * len(data))[: len(data) - start]
    path.write_bytes(data)
    assert source.fetch(30)[:2] == ("tokens-00001.tar/document 30", None)


def test_a_bad_document_leaves_no_index(tmp_path: Path) -> None:
    odd = [*documents(3), np.array([BOS, 9], np.uint16)]
    write_token_folder(tmp_path, odd, VOCABULARY, documents_per_shard=2)
    with pytest.raises(BadDocument, match=r"tokens-00001\.tar: 000000003\.ids"):
        TokenSource.open(tmp_path)
    assert not (tmp_path / INDEX).exists() and not list(tmp_path.glob("*.tmp"))
