"""Tar shards in the WebDataset layout: read from a file or a URL, write atomically, describe and verify.

A shard is a tar of files; files that share a name up to its first dot are one sample, and follow each other.
A token shard holds one file a document, `KEY.ids`: its token ids as raw little-endian integers of the
vocabulary's dtype. A folder of token shards is described by its `manifest.json`.
"""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.json_file import check_fields
from data_pipeline.files.json_text import parse_json
from data_pipeline.files.printable import hidden_characters, printable
from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.vocabulary import Vocabulary

MANIFEST = "manifest.json"
TOKENS_SUFFIX = "ids"
FORMAT = 1


class ShardError(ConfigError):
    """A shard that cannot be read as it stands: truncated, not a tar, missing, or with a wrong checksum."""


@dataclass(frozen=True)
class Url:
    """A shard that webdataset's gopen opens: a URL (https:, gs:, hf: ...), or `pipe:` and a command.

    A Url is made from what a person typed (`typed_location`) and from nothing else. A Path is opened as a
    file, whatever its name looks like, so no file's name is ever run as a command.
    """

    text: str

    def __str__(self) -> str:
        return self.text


Location = Path | Url
"""Where a shard is."""
Sample = Mapping[str, bytes | None]
"""extension -> content; None: the content was not read, since the sample is too large."""


def typed_location(text: str) -> Location:
    """The Location that a person named: a Url where `text` begins with a scheme, else a Path."""
    if text.startswith("pipe:") or ("://" in text and not text.startswith("file://")):
        return Url(text)
    return Path(text.removeprefix("file://"))


def open_shard(location: Location) -> Any:
    """A readable byte stream of a regular file or of any URL that `webdataset.gopen` knows."""
    if isinstance(location, Path):
        if location.exists() and not location.is_file():
            raise OSError("not a regular file")  # a named pipe would be waited for without end
        return location.open("rb")
    try:
        return _gopen()(location.text, "rb")
    except ValueError as error:
        advice = (
            f'for a scheme that has no reader here, type a command, such as "pipe:aws s3 cp {location} -"'
        )
        raise OSError(f"{error}; {advice}") from None


def prepare_to_open(locations: Iterable[Location]) -> None:
    """Import now what opens them, so that processes that are forked from this one need not."""
    if any(isinstance(location, Url) for location in locations):
        _gopen()


def _gopen() -> Any:
    from webdataset.gopen import gopen  # costs seconds: it imports torch

    return gopen


def split_name(name: str, _key_before: str = "") -> tuple[str, str]:
    """("a/0001", "0.png") for "a/0001.0.png": the key ends at the first dot after the last slash."""
    folder, slash, file = name.rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension


def read_samples(
    location: Location,
    *,
    max_sample_bytes: int | None = None,
    split: Callable[[str, str], tuple[str, str]] = split_name,
) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """(key, {extension: content}) for every sample of a shard, in order. A shard may be compressed by gzip.

    `split`: (name of a member, key of the one before) -> (key, extension). Contents that would take a sample
    above `max_sample_bytes` are not read, and are None. Raises ShardError naming the shard and the sample it
    broke after, if the tar is cut short or damaged. tarfile itself takes a cut between two files, or a
    damaged header, for the end of the archive.
    """
    key, sample, num_bytes = "", dict[str, bytes | None](), 0
    try:
        with open_shard(location) as stream:
            reader: Any = _ZeroTailReader(_decompressed(stream))  # tarfile asks for no more of a file
            with tarfile.open(fileobj=reader, mode="r|") as archive:
                for member in archive:
                    if not member.isfile():
                        continue
                    member_key, extension = split(member.name, key)
                    if member_key != key and sample:
                        yield key, sample
                        sample, num_bytes = {}, 0
                    key = member_key
                    num_bytes += member.size + tarfile.BLOCKSIZE
                    if max_sample_bytes is None or num_bytes <= max_sample_bytes:
                        file = archive.extractfile(member)
                        assert file is not None, "a regular file has content"
                        sample[extension] = file.read()
                    elif len(sample) < _MOST_UNREAD:
                        sample[extension] = None
                reader.check_end(archive.offset)
    except OSError as error:
        raise ShardError(f"{location}: cannot be read: {printable(str(error))}") from None
    except Exception as error:  # tarfile raises many kinds for damaged headers
        raise _damaged(location, key, error) from None
    if sample:
        yield key, sample


def _damaged(location: Location, key: str, error: Exception) -> ShardError:
    where = f'near sample "{printable(key)}"' if key else "before its first sample"
    why = printable(str(error) or type(error).__name__)
    return ShardError(f"{location}: truncated or damaged {where} ({why}); fetch or write it again")


_MOST_UNREAD = 1000
"""A sample that is too large lists at most so many files that were not read."""


def _decompressed(stream: Any) -> Any:
    """Return what `stream` holds. Its first bytes say whether gzip compressed it, whatever its name says."""
    head = stream.read(2)
    joined: Any = Rejoined(head, stream)  # gzip asks for no more of a file than reading
    return gzip.GzipFile(fileobj=joined) if head == b"\x1f\x8b" else joined


class Rejoined:
    """A stream whose first bytes were read already, for reading by bytes or by lines."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int) -> bytes:
        head, self._head = self._head[:size], self._head[size:]
        return head + self._stream.read(size - len(head)) if len(head) < size else head

    def readline(self, size: int) -> bytes:
        """Return the next line, or its first `size` bytes."""
        end = min(self._head.find(b"\n") + 1 or len(self._head), size)
        line, self._head = self._head[:end], self._head[end:]
        if line.endswith(b"\n") or len(line) == size:
            return line
        return line + self._stream.readline(size - len(line))


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

    def check_end(self, offset: int) -> None:
        """Read to the end. Raises ReadError unless an archive whose members end at `offset` ends well."""
        while self.read(1 << 20):
            pass
        if self.zeros_from > offset:
            raise tarfile.ReadError(f"damaged header at byte {offset}")
        if self.num_bytes < offset + tarfile.BLOCKSIZE:
            raise tarfile.ReadError("it ends without an end-of-archive mark")


def write_shard(path: Path, samples: Iterable[tuple[str, Mapping[str, bytes]]]) -> dict[str, Any]:
    """Write (key, {extension: content}) samples as one tar, atomically; the same samples give the same bytes.

    Returns {"name", "sha256", "bytes", "documents"}, an entry of the manifest's "shards".
    """
    documents = 0
    with atomic_file(path) as file:
        hashing: Any = _HashingWriter(file)  # tarfile asks for no more of a file
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
        manifest = parse_json(path.read_text())
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
        fields |= {name: dict for name in ("special_tokens", "vectors") if name in manifest}
        check_fields(manifest, fields, where=str(path), advice=advice)
        validate(Vocabulary, Vocabulary.values_of(manifest), f"{path}: vocabulary")
        for name, entry in manifest["tokenizers"].items():
            check_fields(entry, {"fingerprint": str}, where=f"{path}: tokenizers.{name}", advice=advice)
        for number, entry in enumerate(manifest["shards"]):
            check_fields(entry, _ENTRY_FIELDS, where=f"{path}: shards[{number}]", advice=advice)
            check_file_name(entry["name"], f"{path}: shards[{number}]: name")
    except ConfigError as error:
        raise ShardError(str(error)) from None


_ENTRY_FIELDS = {"name": str, "sha256": str, "bytes": int, "documents": int}


def check_file_name(name: str, where: str) -> None:
    """Raise ShardError, which begins with `where`, unless `name` is that of a file in the same folder."""
    if name in ("", ".", "..") or PurePath(name).name != name or hidden_characters(name):
        raise ShardError(
            f"{where} = {json.dumps(name)}: not the name of a file in this folder; legal: a name without "
            "folders and without control characters. Rename it, or tokenize again"
        )
