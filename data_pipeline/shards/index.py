"""The index of a folder of token shards: position, length and checksum of each document, and its spans.

The index is one file, `index.bin`, beside the shards: a JSON header and flat arrays that every process maps
into memory, so a billion documents cost no Python objects and no copies in forked workers. It is made once
from the tars, which checks each tar against the manifest and each document against the vocabulary, and is
made again only if the manifest lists other shards.
"""

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import time
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.build_index import TAR_BLOCK_BYTES, index_shard, member_name
from data_pipeline.shards.faults import ChangedIndex, MissingShard, TruncatedShard, WrongChecksum
from data_pipeline.shards.tar import MANIFEST, TOKENS_SUFFIX, ShardError, read_manifest
from data_pipeline.shards.vocabulary import Vocabulary

INDEX = "index.bin"
FORMAT = 1
_MAGIC = b"motleyix"
_ALIGN_BYTES = 64
_DEAD_AFTER_S = 3600.0
"""A temporary file of this age has no writer: writing takes seconds, though clocks of machines may differ."""
_OPEN_FILES = 128
"""Files that a source keeps open in a process, whose usual limit is 1024."""


_NO_RANGES = np.zeros((0, 2), np.int64)


@dataclass(frozen=True)
class Index:
    """Arrays over the N documents of a folder, in shard order, and over the spans of all these documents."""

    offset: np.ndarray
    """uint64 [N]; byte at which a document's ids start in its shard."""
    length: np.ndarray
    """uint32 [N]; number of ids."""
    crc32: np.ndarray
    """uint32 [N]; checksum of the ids' bytes."""
    shard_first: np.ndarray
    """uint64 [shards + 1]; number of the first document of each shard, then N."""
    span_first: np.ndarray
    """uint64 [N + 1]; first row in `span` of each document."""
    span: np.ndarray
    """uint32 [spans, 2]; start and end, in its document, of each span other than text, with delimiters."""
    masked_first: np.ndarray | None = None
    """uint64 [N + 1]; first row in `masked` of each document; None where all ids are targets."""
    masked: np.ndarray | None = None
    """uint32 [ranges, 2]; ranges of ids of a document that are no targets (loss_mask.py)."""


_ARRAYS = {
    "offset": "<u8",
    "length": "<u4",
    "crc32": "<u4",
    "shard_first": "<u8",
    "span_first": "<u8",
    "span": "<u4",
    "masked_first": "<u8",
    "masked": "<u4",
}
"""Arrays in the order of the file; the last two are there only where some ids are no targets."""


class TokenSource:
    """A folder of token shards from which any document can be read at any time. Immutable; safe to fork."""

    def __init__(self, folder: Path, manifest: dict[str, Any], header: dict[str, Any], index: Index) -> None:
        self.folder = folder
        self.manifest = manifest
        self.vocabulary = Vocabulary(**Vocabulary.values_of(manifest))
        self._dtype = self.vocabulary.dtype
        self.index = index
        self.index_hash: str = header["hash"]
        self.num_documents = len(index.length)
        self.longest_span_tokens: int = header["longest_span_tokens"]
        """Length of the longest span other than text, with its delimiters; 0 where there is only text."""
        self._names = [entry["name"] for entry in manifest["shards"]]
        self._shard_first = index.shard_first.astype(np.int64).tolist()
        self._files: dict[int, int] = {}
        weakref.finalize(self, _close_all, self._files).atexit = False

    @classmethod
    def open(cls, path: str | Path) -> "TokenSource":
        """Open a folder that `motley tokenize` wrote, making its index if there is none for its manifest.

        Raises ShardError without a manifest, MissingShard or TruncatedShard, and ChangedIndex if the index
        does not match its own hash. Making the index may raise WrongChecksum and BadDocument.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        _check_sizes(folder, manifest)
        header = _read_header(folder)
        if header is None or header["manifest"] != manifest_hash(manifest):
            header = build_index(folder)
        return cls(folder, manifest, header, _map_arrays(folder, header))

    @property
    def lengths(self) -> np.ndarray:
        """uint32 [num_documents]; number of ids of each document."""
        return self.index.length

    @property
    def fingerprints(self) -> dict[str, str]:
        """Modality -> fingerprint of its tokenizer."""
        return {name: entry["fingerprint"] for name, entry in self.manifest["tokenizers"].items()}

    @property
    def shard_hashes(self) -> frozenset[str]:
        """sha256 of the shards that hold documents: what tells whether two folders share data."""
        return frozenset(entry["sha256"] for entry in self.manifest["shards"] if entry["documents"])

    def spans(self, document: int) -> np.ndarray:
        """int64 [n, 2]; start and end of each span other than text in a document, with its delimiters."""
        first, last = self.index.span_first[document : document + 2]
        return self.index.span[int(first) : int(last)].astype(np.int64)

    @property
    def has_masks(self) -> bool:
        """Whether some ids are no targets."""
        return self.index.masked is not None

    def masked(self, document: int) -> np.ndarray:
        """int64 [n, 2]; the ranges of a document's ids that are no targets."""
        if self.index.masked is None or self.index.masked_first is None:
            return _NO_RANGES
        first, last = self.index.masked_first[document : document + 2]
        return self.index.masked[int(first) : int(last)].astype(np.int64)

    def shard_of(self, document: int) -> int:
        """Number of the shard that holds a document."""
        return bisect_right(self._shard_first, document) - 1

    def documents_of_shard(self, name: str) -> tuple[int, int]:
        """(first, one past the last) number of the documents of a shard; (0, 0) for a name that is none."""
        if name not in self._names:
            return 0, 0
        shard = self._names.index(name)
        return self._shard_first[shard], self._shard_first[shard + 1]

    def fetch(self, document: int) -> tuple[str, np.ndarray | None, int]:
        """("shard/key", ids, crc32 of the bytes that were read) of a document, in one read. The crc32 goes on
        over its masked ranges, where it has some.

        The ids are None if the bytes do not match the index. The key is read beside them: where it is damaged
        too, the number of the document stands for it.
        """
        shard = self.shard_of(document)
        size = int(self.index.length[document]) * self._dtype.itemsize
        start = int(self.index.offset[document]) - TAR_BLOCK_BYTES  # the tar header carries the key
        try:
            data = os.pread(self._file(shard), TAR_BLOCK_BYTES + size, start)
        except OSError as error:
            raise ShardError(f"{self.folder / self._names[shard]}: cannot be read: {error}") from None
        ids = memoryview(data)[TAR_BLOCK_BYTES:]
        key = member_name(data).removesuffix("." + TOKENS_SUFFIX)
        if not key or not key.isprintable():
            key = f"document {document}"
        name = f"{self._names[shard]}/{key}"
        crc32 = zlib.crc32(ids)
        if len(ids) != size or crc32 != int(self.index.crc32[document]):
            return name, None, crc32
        if len(masked := self.masked(document)):
            crc32 = zlib.crc32(masked.tobytes(), crc32)
        return name, np.frombuffer(ids, self._dtype), crc32

    def read(self, document: int) -> np.ndarray:
        """The ids of a document, read-only. Raises WrongChecksum if they do not match the index."""
        name, ids, _ = self.fetch(document)
        if ids is None:
            raise WrongChecksum(
                f"{self.folder}: {name} does not match the index (crc32); the shard was damaged or replaced: "
                f"restore it, or tokenize again"
            )
        return ids

    def name(self, document: int) -> str:
        """ "shard/key" of a document."""
        return self.fetch(document)[0]

    def _file(self, shard: int) -> int:
        """A descriptor of a shard. pread moves no file position, so forked processes may share it."""
        descriptor = self._files.get(shard)
        if descriptor is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = self.folder / self._names[shard]
            try:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise _missing(path) from None
            self._files[shard] = descriptor
        return descriptor


def _close_all(files: dict[int, int]) -> None:
    while files:
        os.close(files.popitem()[1])


def manifest_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 over the entries that decide a folder's tokens: vocabulary, tokenizers, sha256 of shards."""
    content = {
        "vocabulary": list(manifest["vocabulary"].items()),
        **{key: manifest[key] for key in ("special_tokens", "vectors") if key in manifest},
        "tokenizers": {name: entry["fingerprint"] for name, entry in manifest["tokenizers"].items()},
        "shards": [[entry[key] for key in ("name", "sha256", "bytes")] for entry in manifest["shards"]],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def build_index(folder: Path) -> dict[str, Any]:
    """Read all shards of a folder, check them and write its index, atomically. Returns the header.

    Several processes may build it at once: each process writes a file of its own, and the last rename wins
    with the same bytes. Raises MissingShard, TruncatedShard, WrongChecksum or BadDocument, naming the file.
    """
    manifest = read_manifest(folder)
    _check_sizes(folder, manifest)
    vocabulary = Vocabulary(**Vocabulary.values_of(manifest))
    shards: list[dict[str, np.ndarray]] = []
    with Progress(f"index {folder}", total=len(manifest["shards"]), unit="shards") as progress:
        for entry in manifest["shards"]:
            shards.append(index_shard(folder / entry["name"], entry, vocabulary))
            progress.advance()
    arrays = _join(shards)
    longest = int((arrays["span"][:, 1] - arrays["span"][:, 0]).max()) if len(arrays["span"]) else 0
    header = {
        "format": FORMAT,
        "manifest": manifest_hash(manifest),
        "longest_span_tokens": longest,
        "arrays": {name: list(array.shape) for name, array in arrays.items()},
    }
    header["hash"] = _hash(header, arrays)
    _write_index(folder, header, arrays)
    return header


def _write_index(folder: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write index.bin atomically, and remove temporary files of writers that died."""
    temporary = folder / f"{INDEX}.{secrets.token_hex(4)}.tmp"
    try:
        with open(temporary, "xb") as file:
            text = json.dumps(header).encode()
            file.write(_MAGIC + len(text).to_bytes(8, "little") + text)
            for name, array in arrays.items():
                file.write(b"\0" * (-file.tell() % _ALIGN_BYTES))
                file.write(np.ascontiguousarray(array, _ARRAYS[name]).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / INDEX)
    except OSError as error:
        raise ConfigError(
            f"{folder}: there is no index for these shards yet, and it cannot be written ({error.strerror}); "
            f"make room, or open them once (`motley tokenize` does) where the folder is writable"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    for path in folder.glob(f"{INDEX}.*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _DEAD_AFTER_S:
                path.unlink()


def _hash(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over the arrays and over the header without its own hash."""
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in header.items() if k != "hash"}, sort_keys=True).encode()
    )
    for name, array in arrays.items():
        digest.update(np.ascontiguousarray(array, _ARRAYS[name]).data)
    return digest.hexdigest()


def _read_header(folder: Path) -> dict[str, Any] | None:
    """The index's header; None if there is no index, or one of another format, which is then made again."""
    try:
        with open(folder / INDEX, "rb") as file:
            start = file.read(16)
            if start[:8] != _MAGIC:
                raise _changed(folder / INDEX)
            header = json.loads(file.read(int.from_bytes(start[8:], "little")))
            if header["format"] != FORMAT:
                return None
            if header.keys() != {"format", "manifest", "longest_span_tokens", "arrays", "hash"}:
                raise _changed(folder / INDEX)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{folder / INDEX}: cannot be read ({error.strerror})") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise error if isinstance(error, ChangedIndex) else _changed(folder / INDEX) from None
    return header


def _map_arrays(folder: Path, header: Mapping[str, Any]) -> Index:
    """Map the arrays and check them against the header's hash (a sequential read, 1-2 GB/s)."""
    path = folder / INDEX
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    position = 16 + int.from_bytes(view[8:16], "little")
    arrays: dict[str, np.ndarray] = {}
    try:
        for name, shape in header["arrays"].items():
            dtype = _ARRAYS[name]
            position += -position % _ALIGN_BYTES
            arrays[name] = np.frombuffer(view, dtype, int(np.prod(shape)), position).reshape(shape)
            position += arrays[name].nbytes
        known = list(arrays) in (list(_ARRAYS), list(_ARRAYS)[:-2])
        whole = known and _hash(header, arrays) == header["hash"]
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # ends too early, or the header itself is damaged
        whole = False
    if not whole:
        raise _changed(path)
    return Index(**arrays)


def _changed(path: Path) -> ChangedIndex:
    return ChangedIndex(
        f"{path}: damaged, it does not match its own hash; delete it, and it is made again from the shards"
    )


def _missing(path: Path) -> MissingShard:
    return MissingShard(
        f"{path}: missing, but listed in {path.parent / MANIFEST}; copy it back, or tokenize again"
    )


def _check_sizes(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise MissingShard or TruncatedShard unless every shard has the size that the manifest says."""
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        try:
            size = path.stat().st_size
        except FileNotFoundError:
            raise _missing(path) from None
        if size != entry["bytes"]:
            what = "truncated" if size < entry["bytes"] else "too long"
            raise TruncatedShard(
                f"{path}: {what}, {size} bytes where {MANIFEST} says {entry['bytes']}; "
                f"copy it again, or tokenize again"
            )


def _join(shards: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays of all shards in a row, with the numbers of first documents, spans and masked ranges."""

    def together(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(shard[name] for shard in shards)])

    none = np.zeros(0, np.int64)
    masked = together("masked", np.zeros((0, 2), np.int64))
    masked_first = np.concatenate([[0], np.cumsum(together("num_masked", none))])
    return {
        "offset": together("offset", none.astype(np.uint64)),
        "length": together("length", none),
        "crc32": together("crc32", none.astype(np.uint32)),
        "shard_first": np.cumsum([0, *(len(shard["length"]) for shard in shards)]),
        "span_first": np.concatenate([[0], np.cumsum(together("num_spans", none))]),
        "span": together("span", np.zeros((0, 2), np.int64)),
        **({"masked_first": masked_first, "masked": masked} if len(masked) else {}),
    }
