"""Raw shards of any kind as samples (key, {ending: content}): tars, Parquet, JSON lines, JSON, text.

    shard.tar .tar.gz .tgz     files with one name up to the first dot are a sample
    rows.parquet               a row is a sample: columns of bytes are members, and the others its .json
    rows.jsonl .jsonl.gz       a line is a sample that has a .json alone
    rows.json .json.gz         an element of a list is such a sample; a file that is no list is JSON lines
    text.txt                   the file, or each of its lines, is a sample that has a .txt alone

Files that a .json names are read from the folder that [source] declares, and from no place outside of it.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from data_pipeline.files.json_text import parse_json
from data_pipeline.files.printable import printable
from data_pipeline.shards.tar import (
    Location,
    Rejoined,
    Sample,
    ShardError,
    Url,
    open_shard,
    read_samples,
    split_name,
)
from data_pipeline.tokenize.layout import FILE_PREFIX, SourceSettings, file_names, is_inside
from data_pipeline.tokenize.raw import JSON

TXT = "txt"
KINDS_OF_FILES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("tar", (".tar", ".tar.gz", ".tgz")),
    ("Parquet", (".parquet",)),
    ("JSON lines", (".jsonl", ".jsonl.gz", ".ndjson")),
    ("JSON", (".json", ".json.gz")),
    ("text", (".txt",)),
)
"""(kind, endings of its files), in the order in which they are looked for."""
_PARQUET_ROWS = 16
"""Rows that are decoded at a time."""
_CHUNK = 1 << 20
_GAP = re.compile(r"[ \t\r\n,]*")
"""What stands between two elements of a list."""


def kind_of(name: str) -> str | None:
    """The kind of a file by its ending, in small or capital letters; None for a file that is no raw shard."""
    return next((kind for kind, endings in KINDS_OF_FILES if name.lower().endswith(endings)), None)


def read_raw(
    location: Location, source: SourceSettings, max_sample_bytes: int
) -> Iterator[tuple[str, Sample]]:
    """(key, {ending: content}) for every sample of a raw shard, in order; what would take a sample above
    `max_sample_bytes` is None. Raises ShardError for a shard that cannot be read. What a Url gives is a tar,
    unless its text ends like another kind of file.
    """
    kind = kind_of(_name(location)) or "tar"
    if kind == "tar":
        split = partial(_split_at_last_dot, source.endings) if source.keys_with_dots else split_name
        for key, sample in read_samples(location, max_sample_bytes=max_sample_bytes, split=split):
            yield key.replace(".", "%2E") if source.keys_with_dots else key, sample
        return
    read = {"Parquet": _parquet, "JSON lines": _json_lines, "JSON": _json, "text": _text}[kind]
    stem = "" if isinstance(location, Url) else _stem(location.name)
    try:
        for number, sample in enumerate(read(location, source, max_sample_bytes)):
            whole_file = kind == "text" and source.documents == "file"
            key = stem if whole_file else f"{stem}-{number:09}"
            yield key, _with_files(sample, location, source, max_sample_bytes)
    except ShardError:
        raise
    except OSError as error:
        raise ShardError(f"{location}: cannot be read: {printable(str(error))}") from None
    except (ValueError, EOFError, zlib.error) as error:
        raise ShardError(f"{location}: no {kind}, or damaged: {printable(str(error)[:300])}") from None


def _name(location: Location) -> str:
    return location.text if isinstance(location, Url) else location.name


def _stem(name: str) -> str:
    endings = [ending for _, endings in KINDS_OF_FILES for ending in endings if name.lower().endswith(ending)]
    return name[: -max(map(len, endings))].replace(".", "%2E")


def _split_at_last_dot(endings: tuple[str, ...], name: str, key: str) -> tuple[str, str]:
    """("v1.5_a", "0.jpg") for "v1.5_a.0.jpg" where `endings` holds 0.jpg, or where `key` is v1.5_a."""
    folder, slash, file = name.rpartition("/")
    for ending in endings:
        if file.lower().endswith("." + ending):
            return folder + slash + file[: -len(ending) - 1], file[-len(ending) :]
    if key and name.startswith(key + "."):
        return key, name[len(key) + 1 :]
    stem, _, ending = file.rpartition(".")
    return folder + slash + (stem or ending), ending if stem else ""


def _json_lines(location: Location, source: SourceSettings, most: int) -> Iterator[Sample]:
    with open_shard(location) as file:
        yield from _lines(_decompressed(file, location), JSON, most)


def _text(location: Location, source: SourceSettings, most: int) -> Iterator[Sample]:
    with open_shard(location) as file:
        if source.documents == "line":
            yield from _lines(file, TXT, most)
        else:
            content = file.read(most + 1)
            yield {TXT: content if len(content) <= most else None}


def _decompressed(file: Any, location: Location) -> Any:
    return gzip.GzipFile(fileobj=file) if _name(location).lower().endswith(".gz") else file


def _lines(file: Any, ending: str, most: int) -> Iterator[Sample]:
    """A sample for each line that is not blank; the content of a line of more than `most` bytes is None."""
    while line := file.readline(most + 1):
        content = line if len(line) <= most else None
        while content is None and line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK)
        if content is None or content.strip():
            yield {ending: None if content is None else content.rstrip(b"\r\n")}


def _json(location: Location, source: SourceSettings, most: int) -> Iterator[Sample]:
    """A sample for each element of a JSON list. One element at a time is in memory."""
    with open_shard(location) as opened:
        file = _decompressed(opened, location)
        head = file.read(_CHUNK)
        if not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            yield from _lines(Rejoined(head, file), JSON, most)
            return
        text, rest = _decode(head, b"")
        decoder, position = json.JSONDecoder(), text.index("[") + 1
        while True:
            gap = _GAP.match(text, position)
            position = gap.end() if gap else position
            if text.startswith("]", position):
                return
            try:
                _, end = decoder.raw_decode(text, position)
                if end == len(text):  # A number may go on in what is not read yet.
                    raise ValueError("it ends within its list")
            except RecursionError:
                raise ValueError("nested too deeply") from None
            except ValueError:
                text, position = text[position:], 0
                more = file.read(max(_CHUNK, len(text)))  # Doubling keeps repeated decoding linear.
                if not more or len(text) > most + _CHUNK:
                    raise
                added, rest = _decode(more, rest)
                text += added
                continue
            yield {JSON: text[position:end].encode()}
            position = end


def _decode(data: bytes, before: bytes) -> tuple[str, bytes]:
    """(text of whole characters, bytes of one that is cut at the end)."""
    data = before + data
    for cut in range(min(4, len(data) + 1)):
        try:
            return data[: len(data) - cut].decode(), data[len(data) - cut :]
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                raise
    return data.decode(), b""


def _parquet(location: Location, source: SourceSettings, most: int) -> Iterator[Sample]:
    if isinstance(location, Url):
        raise ShardError(f"{location}: Parquet is read from local folders only; fetch it first")
    try:
        from pyarrow import parquet
    except ImportError:
        raise ShardError(f'{location}: needs pyarrow: pip install "motley[formats]"') from None
    with open_shard(location) as file:
        try:
            table = parquet.ParquetFile(file)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS, use_threads=False):
                for row in batch.to_pylist():
                    yield _row_sample(row, most)
        except Exception as error:  # pyarrow raises many kinds for damaged files
            raise ValueError(str(error)) from None


def _row_sample(row: Mapping[str, Any], most: int) -> Sample:
    """Columns of bytes, of {bytes, path} (pictures and sound of Hugging Face), and of lists of these are
    members; the others are the .json.
    """
    members: dict[str, bytes] = {}
    values: dict[str, Any] = {}
    for name, value in row.items():
        items = value if isinstance(value, list) and value else [value]
        contents = [item.get("bytes") if isinstance(item, dict) else item for item in items]
        if all(isinstance(content, bytes) for content in contents):
            for number, content in enumerate(contents):
                members[f"{name}.{number}" if value is items else name] = bytes(content or b"")
        else:
            values[name] = value
    sample = {**members, JSON: json.dumps(values, default=str).encode()}
    too_large = sum(map(len, sample.values())) > most
    return dict.fromkeys(sample) if too_large else sample


def _with_files(sample: Sample, location: Location, source: SourceSettings, most: int) -> Sample:
    """The sample with the files that its .json names: content, None above `most` bytes in all, absent where
    there is no such file in the folder.
    """
    content = sample.get(JSON)
    if not source.file_keys or content is None or isinstance(location, Url):
        return sample
    try:
        values = parse_json(content)
    except ValueError:
        return sample  # The layout says why.
    root = (location.parent / source.folder).resolve()
    names = (
        [name for key in source.file_keys for name in file_names(values, key)]
        if isinstance(values, dict)
        else []
    )
    found: dict[str, bytes | None] = {}
    num_bytes = len(content)
    for name in names:
        path = root / name
        try:
            if is_inside(name) and path.is_file():
                num_bytes += path.stat().st_size
                found[FILE_PREFIX + name] = path.read_bytes() if num_bytes <= most else None
        except OSError:  # such as a name that is too long: the sample lacks the file
            continue
    return {**sample, **found}
