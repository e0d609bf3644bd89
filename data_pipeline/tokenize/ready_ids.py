"""`motley import-data tokens`: ids that somebody else's tokenizing left behind become token shards.

    PREFIX.bin, PREFIX.idx     Megatron-LM's indexed dataset: a document is what its index calls one
    ids.npy, 1-D               documents one after another, each ended by the id --end
    ids.npy, 2-D               a document is a row

Ids are those of the text tokenizer of a data.toml. <bos> and <eos> are put around each document. A folder of
such files is read in the order of their names.
"""

import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.atomic import atomic_folder, write_json
from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.tar import MANIFEST, TOKENS_SUFFIX, write_shard
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.tokenize.config import TokenizeConfig, load_tokenize_config
from data_pipeline.tokenize.prepare import make_manifest
from data_pipeline.tokenize.pretrained_text import PretrainedConfig, PretrainedText
from data_pipeline.tokenize.registry import load_kind, save_tokenizer
from data_pipeline.tokenize.sources import Split
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import TOKENIZERS, load_tokenizers, saved_kinds, vocabulary_of

_MAGIC, _VERSION = b"MMIDIDX\x00\x00", 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Megatron's code of an integer dtype (megatron/core/datasets/indexed_dataset.py, DType)."""
_HEADER = struct.Struct("<9sQBQQ")
DOCUMENTS_PER_SHARD = 10_000
_SCANNED = 1 << 24
"""Ids of an array that are compared with `end` at a time, which bounds memory."""


@dataclass(frozen=True)
class Rules:
    """The rules say which ids make a document."""

    vocabulary: Vocabulary
    num_ids: int
    """Ids of the text tokenizer, without special tokens that were added to it."""
    end: int | None
    """The id that ends a document in a file, and is left out."""


def import_tokens(src: Path, out: Path, *, config_path: Path, end: int | None) -> dict[str, Any]:
    """Write the documents of SRC as a folder of token shards, whole or not at all. Returns its manifest.

    Raises ConfigError for a file of another form, and for an id that is none of the text tokenizer's.
    """
    config, paths = load_tokenize_config(config_path), files_of(src)
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder, or remove it")
    with atomic_folder(out) as writing:
        tokenizers = _tokenizers(config, str(config_path), writing / TOKENIZERS)
        rules = _rules(tokenizers, end)
        documents = _documents(paths, rules)
        records = []
        with Progress("import", total=len(paths), unit="files") as progress:
            while (record := _write(writing, len(records), documents, rules.vocabulary)) is not None:
                records.append(record)
            progress.advance(len(paths))
        if not records:
            raise ConfigError(f"{src}: holds no documents")
        split = Split("", src, tuple((path.name, path.stat().st_size) for path in paths))
        manifest = make_manifest(split, records, tokenizers, saved_kinds(writing / TOKENIZERS))
        write_json(writing / MANIFEST, manifest)
    TokenSource.open(out)  # makes the index, which checks every document
    print(f"{out}: {manifest['num_documents']} documents, {manifest['tokens'][TEXT]} tokens")
    return manifest


def files_of(src: Path) -> list[Path]:
    """The files of SRC, a file or a folder, that hold ids: .npy, and .bin of Megatron. Raises ConfigError."""
    if src.is_dir():
        found = sorted(path for path in src.iterdir() if path.suffix in (".npy", ".bin") and path.is_file())
    else:
        named = [src, src.with_name(src.name + ".bin")] if src.suffix not in (".idx",) else []
        named += [src.with_suffix(".bin")]
        found = [path for path in named if path.is_file() and path.suffix in (".npy", ".bin")][:1]
    if not found:
        raise ConfigError(f"{src}: no .npy, and no .bin beside an .idx; legal: such a file, or a folder")
    return found


def read_documents(path: Path, end: int | None) -> Iterator[np.ndarray]:
    """The ids of each document of a file, without the id `end` behind it. Raises ConfigError."""
    for ids in _megatron(path) if path.suffix == ".bin" else _array(path, end):
        yield ids[:-1] if len(ids) and end is not None and int(ids[-1]) == end else ids


def _array(path: Path, end: int | None) -> Iterator[np.ndarray]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as an array: {error}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2):
        raise ConfigError(f"{path}: an array {ids.shape} of {ids.dtype}; legal: 1-D or 2-D, of integers")
    if ids.ndim == 2:
        yield from ids
        return
    if end is None:
        raise ConfigError(f"{path}: a 1-D array, whose documents end at an id that --end names")
    first = 0
    for begin in range(0, len(ids), _SCANNED):
        for last in (begin + np.flatnonzero(ids[begin : begin + _SCANNED] == end)).tolist():
            yield ids[first : last + 1]
            first = last + 1
    if first < len(ids):
        yield ids[first:]


def _megatron(path: Path) -> Iterator[np.ndarray]:
    index = path.with_suffix(".idx")
    try:
        data = index.read_bytes()
        magic, version, code, num_sequences, num_borders = _HEADER.unpack_from(data)
    except (OSError, struct.error) as error:
        raise ConfigError(f"{index}: cannot be read: {error}") from None
    wanted = _HEADER.size + 12 * num_sequences + 8 * num_borders
    if magic != _MAGIC or version != _VERSION or code not in _DTYPES or len(data) != wanted:
        raise ConfigError(
            f"{index}: no index of Megatron-LM of version {_VERSION} over integers ({len(data)} bytes, code "
            f"{code}); multimodal ones are not read"
        )
    dtype, at = np.dtype(_DTYPES[code]), _HEADER.size
    length = np.frombuffer(data, "<i4", num_sequences, at).astype(np.int64)
    pointer = np.frombuffer(data, "<i8", num_sequences, at + 4 * num_sequences)
    borders = np.frombuffer(data, "<i8", num_borders, at + 12 * num_sequences).tolist()
    ids = np.memmap(path, dtype, "r") if path.stat().st_size else np.zeros(0, dtype)
    start = pointer // dtype.itemsize
    if (start + length > len(ids)).any() or (start < 0).any() or (length < 0).any():
        raise ConfigError(f"{path}: shorter than {index} says; copy both again")
    for first, last in pairwise(borders):
        stretches = (ids[start[i] : start[i] + length[i]] for i in range(first, last))
        yield np.concatenate([ids[:0], *stretches])


def _tokenizers(config: TokenizeConfig, where: str, folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers of a data.toml, saved into `folder`. Raises ConfigError for those that are fitted."""
    if config.settings.tokenizers_from is not None:
        load_tokenizers(Path(config.settings.tokenizers_from))
        shutil.copytree(config.settings.tokenizers_from, folder)
        return load_tokenizers(folder)
    tables = config.tables
    fitted = [name for name in tables if not isinstance(tables[name].config, PretrainedConfig)]
    if fitted:
        raise ConfigError(
            f"{where}: the tokenizers of {', '.join(fitted)} are fitted on documents, which ids are not; "
            'name tokenizers_from, or [text] kind = "huggingface" or "sentencepiece"'
        )
    for name, table in config.tables.items():
        definition = load_kind(name, table.kind, f"{where}: {name}.kind")
        save_tokenizer(
            folder / name, name, table.kind, definition.fit((), table.config, config.settings.seed)
        )
    return load_tokenizers(folder)


def _rules(tokenizers: Mapping[str, Tokenizer], end: int | None) -> Rules:
    text = tokenizers[TEXT]
    num_ids = text.codec.num_ids if isinstance(text, PretrainedText) else text.size
    if end is not None and not 0 <= end < num_ids:
        raise ConfigError(f"--end {end}: the text tokenizer has the ids 0 ... {num_ids - 1}")
    return Rules(vocabulary_of(tokenizers), num_ids, end)


def _documents(paths: Sequence[Path], rules: Rules) -> Iterator[np.ndarray]:
    """`<bos> ids <eos>` of each document that has ids. Raises ConfigError for an id that is no text."""
    vocabulary = rules.vocabulary
    for path in paths:
        for number, found in enumerate(read_documents(path, rules.end)):
            ids = found.astype(np.int64)
            if not len(ids):
                continue
            if ids.min() < 0 or ids.max() >= rules.num_ids:
                wrong = int(ids[(ids < 0) | (ids >= rules.num_ids)][0])
                raise ConfigError(
                    f"{path}: document {number} holds the id {wrong}; the text tokenizer has 0 ... "
                    f"{rules.num_ids - 1}: are the ids those of another tokenizer?"
                )
            if ids[0] == vocabulary.bos:  # of a file that begins documents, as Motley does
                ids = ids[1:]
            special = ids[vocabulary.is_special(ids)]
            if len(special):
                raise ConfigError(
                    f"{path}: document {number} holds the special token {special[0]} within its text; where "
                    f"it ends documents, say --end {special[0]}"
                )
            if len(ids):
                yield np.concatenate([[vocabulary.bos], ids, [vocabulary.eos]]).astype(vocabulary.dtype)


def _write(
    folder: Path, number: int, documents: Iterator[np.ndarray], vocabulary: Vocabulary
) -> dict[str, Any] | None:
    """Write the next token shard. Returns its record, as `motley tokenize` has one; None behind the last."""
    chosen = list(islice(documents, DOCUMENTS_PER_SHARD))
    if not chosen:
        return None
    first = number * DOCUMENTS_PER_SHARD
    samples = ((f"{first + i:012d}", {TOKENS_SUFFIX: ids.tobytes()}) for i, ids in enumerate(chosen))
    tokens = dict.fromkeys(vocabulary.modalities, 0) | {TEXT: sum(map(len, chosen))}
    shard = write_shard(folder / f"tokens-{number:05d}.tar", samples)
    return {"shard": shard, "num_skipped": 0, "skipped": [], "tokens": tokens, "measured": {}}
