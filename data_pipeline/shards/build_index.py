"""One token shard -> the arrays of the index for its documents, with every byte checked on the way."""

import hashlib
import mmap
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.printable import printable
from data_pipeline.shards.faults import BadDocument, TruncatedShard, WrongChecksum
from data_pipeline.shards.loss_mask import MASKED_SUFFIX, from_bytes
from data_pipeline.shards.spans import SpanError, Spans, find_spans
from data_pipeline.shards.tar import MANIFEST, TOKENS_SUFFIX
from data_pipeline.shards.vectors import VECTORS_SUFFIX
from data_pipeline.shards.vectors import from_bytes as vectors_from_bytes
from data_pipeline.shards.vocabulary import Vocabulary

TAR_BLOCK_BYTES = 512
_CHECK_IDS = 1 << 22
"""Documents are checked in groups of about so many ids, which bounds memory."""


def index_shard(path: Path, entry: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, np.ndarray]:
    """Arrays of data_pipeline.shards.index.Index for one shard, and the numbers of spans and of masked ranges
    of each document. Offsets of documents without vectors are 0.

    Raises WrongChecksum, TruncatedShard or BadDocument, naming shard and document.
    """
    itemsize = vocabulary.dtype.itemsize
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        digest = hashlib.sha256(view).hexdigest()
        if digest != entry["sha256"]:
            raise WrongChecksum(
                f"{path}: sha256 {digest}, but {MANIFEST} says {entry['sha256']}; copy it again, or "
                f"tokenize again"
            )
        members, masked, vectors = _by_document(path, view)
        offset = np.array([start for _, start, _ in members], np.uint64)
        size = np.array([size for _, _, size in members], np.int64)
        names = [name for name, _, _ in members]
        for name, num_bytes in zip(names, size, strict=True):
            if num_bytes % itemsize:
                raise BadDocument(f"{path}: {name} holds {num_bytes} bytes, not a multiple of {itemsize}")
        length = size // itemsize
        crc32 = np.array([zlib.crc32(view[start : start + n]) for _, start, n in members], np.uint32)
        counts, spans = _check_documents(path, view, names, offset, length, vocabulary)
        num_masked, ranges = _check_masks(path, view, names, length, masked)
        vectors_offset, vectors_crc32 = _check_vectors(path, view, members, vectors, vocabulary)
    return {
        **{"offset": offset, "length": length, "crc32": crc32, "num_spans": counts, "span": spans},
        **{"num_masked": num_masked, "masked": ranges},
        **{"vectors_offset": vectors_offset, "vectors_crc32": vectors_crc32},
    }


_Member = tuple[str, int, int]
"""(name, offset of the content, its size in bytes)."""
_Place = tuple[int, int]
"""(offset of the content, its size in bytes)."""


def _by_document(path: Path, view: mmap.mmap) -> tuple[list[_Member], dict[int, _Place], dict[int, _Place]]:
    """(members with ids; document -> place of its masked ranges; document -> place of its vectors). Raises
    BadDocument for any other member."""
    members: list[_Member] = []
    masked: dict[int, _Place] = {}
    vectors: dict[int, _Place] = {}
    for name, start, size in _members(path, view):
        key, _, suffix = name.rpartition(".")
        document = len(members) - 1
        is_behind_its_ids = bool(members) and members[-1][0] == f"{key}.{TOKENS_SUFFIX}"
        if suffix == TOKENS_SUFFIX:
            members.append((name, start, size))
        elif suffix == MASKED_SUFFIX and is_behind_its_ids and document not in vectors:
            masked[document] = start, size
        elif suffix == VECTORS_SUFFIX and is_behind_its_ids and document not in vectors:
            vectors[document] = start, size
        else:
            raise BadDocument(
                f'{path}: holds "{name}"; a token shard has .{TOKENS_SUFFIX} files, and behind that of the '
                f"same key a .{MASKED_SUFFIX} file and a .{VECTORS_SUFFIX} file"
            )
    return members, masked, vectors


def _check_masks(
    path: Path, view: mmap.mmap, names: list[str], length: np.ndarray, masked: Mapping[int, tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """(number of masked ranges of each document [n], start and end of each range [ranges, 2]).

    Raises BadDocument for the first document whose ranges are none.
    """
    counts, ranges = np.zeros(len(names), np.int64), [np.zeros((0, 2), np.int64)]
    for document, (start, size) in masked.items():
        try:
            found = from_bytes(view[start : start + size], int(length[document]))
        except ValueError as error:
            raise BadDocument(f"{path}: {names[document]}: its .{MASKED_SUFFIX}: {error}") from None
        counts[document] = len(found)
        ranges.append(found)
    return counts, np.concatenate(ranges)


def _check_vectors(
    path: Path,
    view: mmap.mmap,
    members: list[_Member],
    vectors: Mapping[int, _Place],
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """(offset of the vectors of each document, uint64 [n], 0 without vectors; their crc32, uint32 [n]).

    Raises BadDocument for the first document whose vectors are not those that its ids ask for, or not finite.
    """
    offset, crc32 = np.zeros(len(members), np.uint64), np.zeros(len(members), np.uint32)
    if vectors and not vocabulary.vectors:
        raise BadDocument(
            f"{path}: {members[min(vectors)][0]}: has a .{VECTORS_SUFFIX}, but {MANIFEST} names no modality "
            f"of vectors; tokenize again"
        )
    for document, (name, start, size) in enumerate(members if vocabulary.vectors else ()):
        ids = np.frombuffer(view[start : start + size], vocabulary.dtype)
        first, length = vectors.get(document, (0, 0))
        content = view[first : first + length]
        try:
            values = vectors_from_bytes(content, ids, vocabulary)
        except ValueError as error:
            raise BadDocument(f"{path}: {name}: its .{VECTORS_SUFFIX}: {error}") from None
        for modality, each in values.items():
            if not np.isfinite(each).all():
                raise BadDocument(f"{path}: {name}: a vector of {modality} is not finite")
        offset[document], crc32[document] = first, zlib.crc32(content)
    return offset, crc32


def _members(path: Path, view: mmap.mmap) -> Iterator[_Member]:
    """Each file in a tar.

    tarfile takes 50 us a member, most of it for fields that are not needed here; this loop takes 2.
    """
    position = 0
    while True:
        header = view[position : position + TAR_BLOCK_BYTES]
        if len(header) < TAR_BLOCK_BYTES:
            raise TruncatedShard(f"{path}: ends without an end-of-archive mark; tokenize again")
        if header[0] == 0:
            return
        digits = header[124:136].strip(b" \0") or b"0"
        if digits.strip(b"01234567"):
            raise BadDocument(f"{path}: the tar header at byte {position} holds no size; tokenize again")
        size = int(digits, 8)
        start = position + TAR_BLOCK_BYTES
        position = start + size + (-size % TAR_BLOCK_BYTES)
        if header[156:157] in (b"x", b"g", b"L", b"K"):  # extended headers: the plain one follows them
            continue
        yield printable(member_name(header)), start, size


def member_name(header: bytes) -> str:
    """Path of a member in its tar header, not yet escaped (POSIX ustar: name in bytes 0-99, prefix in
    bytes 345-499).
    """
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[345:346] != b"\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace")


def _check_documents(
    path: Path,
    view: mmap.mmap,
    names: list[str],
    offset: np.ndarray,
    length: np.ndarray,
    vocabulary: Vocabulary,
) -> tuple[np.ndarray, np.ndarray]:
    """(number of spans of each document [n], start and end of each span in its document [spans, 2]).

    Raises BadDocument for the first document that is none.
    """
    counts, spans = [np.zeros(0, np.int64)], [np.zeros((0, 2), np.int64)]
    first = 0
    while first < len(length):
        total = np.cumsum(length[first:])
        last = first + max(1, int(np.searchsorted(total, _CHECK_IDS, side="right")))
        pieces = [
            np.frombuffer(view, vocabulary.dtype, int(length[i]), int(offset[i])) for i in range(first, last)
        ]
        ids = np.concatenate(pieces)
        del pieces  # views of the map, which cannot be closed while they live
        starts = np.concatenate([[0], total[: last - first]])
        group_spans = _check_group(path, names[first:last], ids, starts, vocabulary)
        # no span goes from one document into the next: the <eos> between them would be inside of it
        owner = np.searchsorted(starts, group_spans.start, side="right") - 1
        counts.append(np.bincount(owner, minlength=last - first))
        spans.append(np.stack([group_spans.start - starts[owner], group_spans.end - starts[owner]], axis=1))
        first = last
    return np.concatenate(counts), np.concatenate(spans)


def _check_group(
    path: Path, names: list[str], ids: np.ndarray, starts: np.ndarray, vocabulary: Vocabulary
) -> Spans:
    """The spans of documents in a row: document i of `names` is ids[starts[i]:starts[i + 1]].

    Raises BadDocument, naming the document and its first wrong id.
    """
    short = np.flatnonzero(np.diff(starts) < 2)
    if len(short):
        raise BadDocument(f"{path}: {names[short[0]]} has fewer than two ids")
    first, last = ids[starts[:-1]], ids[starts[1:] - 1]
    open_ended = np.flatnonzero((first != vocabulary.bos) | (last != vocabulary.eos))
    if len(open_ended):
        raise BadDocument(f"{path}: {names[open_ended[0]]} does not start with <bos> and end with <eos>")
    try:
        return find_spans(ids, vocabulary)
    except SpanError as error:
        document = int(np.searchsorted(starts, error.position, side="right")) - 1
        own_error = _own_error(ids[starts[document] : starts[document + 1]], vocabulary, error)
        raise BadDocument(f"{path}: {names[document]}: {own_error}") from None


def _own_error(ids: np.ndarray, vocabulary: Vocabulary, error: SpanError) -> SpanError:
    """The error of one document, whose positions count from its start, for an `error` of many in a row."""
    try:
        find_spans(ids, vocabulary)
    except SpanError as own_error:
        return own_error
    return error
