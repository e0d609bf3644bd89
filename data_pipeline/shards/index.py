"""The index of a folder of token shards: position, length and checksum of each document, and its spans.

The index is one file, `index.bin`, beside the shards: a JSON header and flat arrays that every process maps
into memory, so a billion documents cost no Python objects and no copies in forked workers. It is made once
from the tars, which checks each tar against the manifest and each document against the vocabulary, and is
made again only if the manifest lists other shards.
"""

import hashlib
import json
import os
import weakref
import zlib
from bisect import bisect_right
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_pipeline.files.progress import Progress
from data_pipeline.remote.location import RemoteSettings
from data_pipeline.shards.build_index import TAR_BLOCK_BYTES, index_shard, member_name
from data_pipeline.shards.faults import MissingShard, TruncatedShard, WrongChecksum
from data_pipeline.shards.index_file import FORMAT, Index, index_hash, map_arrays, read_header, write_index
from data_pipeline.shards.tar import (
    MANIFEST,
    TOKENS_SUFFIX,
    Location,
    ShardError,
    Url,
    read_manifest,
    typed_location,
)
from data_pipeline.shards.vectors import from_bytes, num_bytes
from data_pipeline.shards.vocabulary import Vocabulary

if TYPE_CHECKING:
    from data_pipeline.remote.folder import RemoteShards

_OPEN_FILES = 128
"""Files that a source keeps open in a process, whose usual limit is 1024."""


_NO_RANGES = np.zeros((0, 2), np.int64)


class Document(NamedTuple):
    """What a token shard holds of a document."""

    ids: np.ndarray
    """`<bos> parts <eos>`, [n] in the vocabulary's dtype, read-only."""
    vectors: Mapping[str, np.ndarray] = {}
    """Modality of vectors -> its vectors, read-only (vectors.py); empty where all modalities are ids."""


class TokenSource:
    """A folder of token shards from which any document can be read at any time. Immutable; safe to fork."""

    def __init__(
        self,
        folder: Location,
        manifest: dict[str, Any],
        header: dict[str, Any],
        index: Index,
        remote: "RemoteShards | None" = None,
    ) -> None:
        self.folder = folder
        """A folder of this machine, or a URL, which is shown and not opened: it has no signature."""
        self.remote = remote
        """What reads the shards of a URL; None for a folder of this machine."""
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
    def open(cls, path: str | Path, remote: RemoteSettings | None = None) -> "TokenSource":
        """Open a folder that `motley tokenize` wrote, making its index if there is none for its manifest, or
        the URL of a folder that has its index; `remote` says how its files are fetched.

        Raises ShardError without a manifest, MissingShard or TruncatedShard, and ChangedIndex if the index
        does not match its own hash. Making the index may raise WrongChecksum and BadDocument.
        """
        if isinstance(folder := typed_location(str(path)), Url):
            from data_pipeline.remote.source import open_remote  # it imports this module

            return open_remote(folder, remote or RemoteSettings())
        manifest = read_manifest(folder)
        _check_sizes(folder, manifest)
        header = read_header(folder)
        if header is None or header["manifest"] != manifest_hash(manifest):
            header = build_index(folder)
        return cls(folder, manifest, header, map_arrays(folder, header))

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

    def byte_range(self, document: int) -> tuple[int, int, int]:
        """(shard, first byte, one past the last) of all that the shard holds of a document."""
        shard = self.shard_of(document)
        is_last = document + 1 == self._shard_first[shard + 1]
        end = self.manifest["shards"][shard]["bytes"] if is_last else int(self.index.offset[document + 1])
        return shard, int(self.index.offset[document]) - TAR_BLOCK_BYTES, end

    def fetch(self, document: int) -> tuple[str, Document | None, int]:
        """What `_fetch` gives. Bytes of a URL that do not match the index are fetched again, because what was
        kept of them may have been damaged."""
        found = self._fetch(document)
        if found[1] is None and self.remote is not None:
            self.remote.forget(*self.byte_range(document))
            found = self._fetch(document)
        return found

    def _fetch(self, document: int) -> tuple[str, Document | None, int]:
        """("shard/key", content, `checksum` of the bytes that were read) of a document.

        The content is None if the bytes do not match the index. The key is read beside the ids: where it is
        damaged too, the number of the document stands for it.
        """
        shard = self.shard_of(document)
        size = int(self.index.length[document]) * self._dtype.itemsize
        start = int(self.index.offset[document]) - TAR_BLOCK_BYTES  # the tar header carries the key
        data = self._read_bytes(shard, start, TAR_BLOCK_BYTES + size)
        content = memoryview(data)[TAR_BLOCK_BYTES:]
        name = self._name(document, shard, data)
        crc32 = zlib.crc32(content)
        if len(content) != size or crc32 != int(self.index.crc32[document]):
            return name, None, crc32
        ids = np.frombuffer(content, self._dtype)
        start, of_vectors = self.vectors_place(document)
        vectors = self._read_bytes(shard, start, num_bytes(ids, self.vocabulary)) if start else b""
        checksum = self.checksum(document, crc32, zlib.crc32(vectors))
        if zlib.crc32(vectors) != of_vectors:
            return name, None, checksum
        return name, Document(ids, from_bytes(vectors, ids, self.vocabulary)), checksum

    def vectors_place(self, document: int) -> tuple[int, int]:
        """(offset in its shard, crc32) of a document's vectors, from the index; (0, 0) where it has none."""
        if self.index.vectors_offset is None or self.index.vectors_crc32 is None:
            return 0, 0
        return int(self.index.vectors_offset[document]), int(self.index.vectors_crc32[document])

    def checksum(self, document: int, ids: int, vectors: int) -> int:
        """32 bits that stand for a document in the fingerprint of training data: the crc32 of its ids, which
        goes on over its masked ranges, and over the crc32 of its vectors, where it has some."""
        masked = self.masked(document)
        crc32 = zlib.crc32(masked.tobytes(), ids) if len(masked) else ids
        has_vectors = self.vectors_place(document) != (0, 0)
        return zlib.crc32(vectors.to_bytes(4, "little"), crc32) if has_vectors else crc32

    def _read_bytes(self, shard: int, start: int, size: int) -> bytes:
        """Bytes of a shard, of which there are fewer at its end. Raises ShardError."""
        if self.remote is not None:
            return self.remote.read(shard, start, size)
        try:
            return os.pread(self._file(shard), size, start)
        except OSError as error:
            raise ShardError(f"{self.folder}/{self._names[shard]}: cannot be read: {error}") from None

    def read(self, document: int) -> np.ndarray:
        """The ids of a document, read-only. Raises WrongChecksum if they do not match the index."""
        return self.document(document).ids

    def document(self, document: int) -> Document:
        """The ids and vectors of a document. Raises WrongChecksum if they do not match the index."""
        name, content, _ = self.fetch(document)
        if content is None:
            raise WrongChecksum(
                f"{self.folder}: {name} does not match the index (crc32); the shard was damaged or replaced: "
                f"restore it, or tokenize again"
            )
        return content

    def name(self, document: int) -> str:
        """ "shard/key" of a document, from its tar header alone."""
        shard, start = self.shard_of(document), int(self.index.offset[document]) - TAR_BLOCK_BYTES
        return self._name(document, shard, self._read_bytes(shard, start, TAR_BLOCK_BYTES))

    def _name(self, document: int, shard: int, header: bytes) -> str:
        key = member_name(header).removesuffix("." + TOKENS_SUFFIX)
        return f"{self._names[shard]}/{key if key and key.isprintable() else f'document {document}'}"

    def _file(self, shard: int) -> int:
        """A descriptor of a shard. pread moves no file position, so forked processes may share it."""
        descriptor = self._files.get(shard)
        if descriptor is None:
            if len(self._files) >= _OPEN_FILES:
                os.close(self._files.pop(next(iter(self._files))))
            path = Path(str(self.folder), self._names[shard])
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
    header["hash"] = index_hash(header, arrays)
    write_index(folder, header, arrays)
    return header


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
    """The arrays of all shards in a row, with the numbers of first documents, spans and masked ranges.

    Arrays of _OPTIONAL are there only where they say something.
    """

    def together(name: str, empty: np.ndarray) -> np.ndarray:
        return np.concatenate([empty, *(shard[name] for shard in shards)])

    none = np.zeros(0, np.int64)
    masked = together("masked", np.zeros((0, 2), np.int64))
    masked_first = np.concatenate([[0], np.cumsum(together("num_masked", none))])
    of_vectors = {
        "vectors_offset": together("vectors_offset", none.astype(np.uint64)),
        "vectors_crc32": together("vectors_crc32", none.astype(np.uint32)),
    }
    return {
        "offset": together("offset", none.astype(np.uint64)),
        "length": together("length", none),
        "crc32": together("crc32", none.astype(np.uint32)),
        "shard_first": np.cumsum([0, *(len(shard["length"]) for shard in shards)]),
        "span_first": np.concatenate([[0], np.cumsum(together("num_spans", none))]),
        "span": together("span", np.zeros((0, 2), np.int64)),
        **({"masked_first": masked_first, "masked": masked} if len(masked) else {}),
        **(of_vectors if of_vectors["vectors_offset"].any() else {}),
    }
