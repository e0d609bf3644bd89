"""Tar shards in the WebDataset layout: read from a file or a URL, write atomically, describe and verify.

A shard is a tar of files; files that share a name up to its first dot are one sample, and follow each other.
A token shard holds one file a document, `KEY.ids`: its token ids as raw little-endian integers of the
vocabulary's dtype. A folder of token shards is described by its `manifest.json`.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.json_file import check_fields
from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.vocabulary import Vocabulary

MANIFEST = "manifest.json"
TOKENS_SUFFIX = "ids"
FORMAT = 1


class ShardError(ConfigError):
    """A shard that cannot be read as it stands: truncated, not a tar, missing, or with a wrong checksum."""


def is_remote(url: str) -> bool:
    """Whether webdataset's gopen must open it, because of a scheme (https:, pipe:, gs:, hf: ...)."""
    return url.startswith("pipe:") or ("://" in url and not url.startswith("file://"))


def open_shard(url: str) -> Any:
    """A readable byte stream of a local path or of any URL that `webdataset.gopen` knows."""
    if not is_remote(url):
        return open(url.removeprefix("file://"), "rb")
    from webdataset.gopen import gopen  # costs seconds: it imports torch

    return gopen(url, "rb")


def read_samples(url: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {extension: content}) for every sample of a shard, in order.

    Raises ShardError naming the shard and the sample it broke after, if the tar is cut short or damaged.
    tarfile itself takes a cut between two files, or a damaged header, for the end of the archive.
    """
    key, sample = "", dict[str, bytes]()
    try:
        with open_shard(url) as stream:
            reader: Any = _ZeroTailReader(stream)  # typeshed asks for more of a file than a stream needs
            with tarfile.open(fileobj=reader, mode="r|") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    member_key, extension = split_name(member.name)
                    if member_key != key and sample:
                        yield key, sample
                        sample = {}
                    key = member_key
                    file = archive.extractfile(member)
                    assert file is not None, "a regular file has content"
                    sample[extension] = file.read()
                reader.drain()
                if reader.zeros_from > archive.offset:
                    raise tarfile.ReadError(f"damaged header at byte {archive.offset}")
                if reader.num_bytes < archive.offset + tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("it ends without an end-of-archive mark")
    except tarfile.TarError as error:
        where = f'near sample "{key}"' if key else "before its first sample"
        raise ShardError(f"{url}: truncated or damaged {where} ({error}); fetch or write it again") from None
    except OSError as error:
        raise ShardError(f"{url}: cannot be read: {error}") from None
    if sample:
        yield key, sample


class _ZeroTailReader:
    """Passes reads through, and counts the bytes and the position from which on they are zeros."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.num_bytes = self.zeros_from = 0

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        content = len(data.rstrip(b"\0"))
        if content:
            self.zeros_from = self.num_bytes + content
        self.num_bytes += len(data)
        return data

    def drain(self) -> None:
        while self.read(1 << 20):
            pass


def split_name(name: str) -> tuple[str, str]:
    """("a/0001", "0.png") for "a/0001.0.png": the key ends at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, Any]:
    """Write (key, {extension: content}) samples as one tar, atomically; the same samples give the same bytes.

    Returns {"name", "sha256", "bytes", "documents"}, an entry of the manifest's "shards".
    """
    documents = 0
    with atomic_file(path) as file:
        hashing: Any = _HashingWriter(file)  # as above
        with tarfile.open(fileobj=hashing, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
            for key, sample in samples:
                for extension, content in sample.items():
                    info = tarfile.TarInfo(f"{key}.{extension}")
                    info.size, info.mode = len(content), 0o644
                    archive.addfile(info, io.BytesIO(content))
                documents += 1
    return {
        "name": path.name,
        "sha256": hashing.sha256.hexdigest(),
        "bytes": hashing.num_bytes,
        "documents": documents,
    }


class _HashingWriter:
    """Passes writes through, and hashes and counts the bytes."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.num_bytes = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.num_bytes += len(data)
        return self._file.write(data)


def fits_a_tar(key: str, extension: str) -> bool:
    """Whether plain tar headers hold the name (100 bytes, or 255 with a folder that splits well)."""
    try:
        tarfile.TarInfo(f"{key}.{extension}").tobuf(tarfile.USTAR_FORMAT, encoding="utf-8", errors="strict")
    except ValueError:
        return False
    return True


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of token shards. Raises ShardError without one that this version reads."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ShardError(
            f"{folder}: no {MANIFEST}, so it is no folder of token shards (or `motley tokenize` has not "
            "ended)"
        ) from None
    except (OSError, ValueError) as error:
        raise ShardError(f"{path}: cannot be read: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ShardError(f"{path}: not a manifest of format {FORMAT}; tokenize again with this version")
    _check_manifest(path, manifest)
    return manifest


def _check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise ShardError, naming the field, for a manifest whose fields are not those that readers rely on."""
    advice = "copy it again, or tokenize again"
    try:
        fields = {"vocabulary": dict, "tokenizers": dict, "shards": list}
        check_fields(manifest, fields, where=str(path), advice=advice)
        validate(Vocabulary, {"sizes": manifest["vocabulary"]}, f"{path}: vocabulary")
        for name, entry in manifest["tokenizers"].items():
            check_fields(entry, {"fingerprint": str}, where=f"{path}: tokenizers.{name}", advice=advice)
        for number, entry in enumerate(manifest["shards"]):
            check_fields(entry, _ENTRY_FIELDS, where=f"{path}: shards[{number}]", advice=advice)
    except ConfigError as error:
        raise ShardError(str(error)) from None


_ENTRY_FIELDS = {"name": str, "sha256": str, "bytes": int, "documents": int}
