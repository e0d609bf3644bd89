"""The file of an index, `index.bin`: a JSON header and flat arrays, with a hash over both."""

import contextlib
import hashlib
import json
import mmap
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import ChangedIndex

INDEX = "index.bin"
FORMAT = 1
_MAGIC = b"motleyix"
_ALIGN_BYTES = 64
_DEAD_AFTER_S = 3600.0
"""A temporary file of this age has no writer: writing takes seconds, though clocks of machines may differ."""


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
    vectors_offset: np.ndarray | None = None
    """uint64 [N]; byte at which a document's vectors start in its shard; None where there are no vectors."""
    vectors_crc32: np.ndarray | None = None
    """uint32 [N]; checksum of the vectors' bytes, which is 0 for a document without vectors."""


_ARRAYS = {
    "offset": "<u8",
    "length": "<u4",
    "crc32": "<u4",
    "shard_first": "<u8",
    "span_first": "<u8",
    "span": "<u4",
    "masked_first": "<u8",
    "masked": "<u4",
    "vectors_offset": "<u8",
    "vectors_crc32": "<u4",
}
"""Arrays in the order of the file."""
_OPTIONAL = (("masked_first", "masked"), ("vectors_offset", "vectors_crc32"))
"""Arrays that are there only where some ids are no targets, and only where there are vectors."""


def write_index(folder: Path, header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
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


def index_hash(header: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over the arrays and over the header without its own hash."""
    digest = hashlib.sha256(
        json.dumps({k: v for k, v in header.items() if k != "hash"}, sort_keys=True).encode()
    )
    for name, array in arrays.items():
        digest.update(np.ascontiguousarray(array, _ARRAYS[name]).data)
    return digest.hexdigest()


def read_header(folder: Path) -> dict[str, Any] | None:
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
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise error if isinstance(error, ChangedIndex) else _changed(folder / INDEX) from None
    return header


def map_arrays(folder: Path, header: Mapping[str, Any]) -> Index:
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
        absent = {name for pair in _OPTIONAL if not arrays.keys() & set(pair) for name in pair}
        known = list(arrays) == [name for name in _ARRAYS if name not in absent]
        whole = known and index_hash(header, arrays) == header["hash"]
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        OverflowError,
    ):  # ends too early, or the header itself is damaged
        whole = False
    if not whole:
        raise _changed(path)
    return Index(**arrays)


def _changed(path: Path) -> ChangedIndex:
    return ChangedIndex(
        f"{path}: damaged, it does not match its own hash; delete it, and it is made again from the shards"
    )
