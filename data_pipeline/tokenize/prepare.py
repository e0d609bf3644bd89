"""`motley tokenize`: raw shards -> token shards, parallel over shards, continued after any interruption.

    SRC/train/*.tar      ->  OUT/train/tokens-00000.tar ..., manifest.json, index.bin
    SRC/heldout/*.tar    ->  OUT/heldout/ ...
    SRC/*.tar            ->  OUT/tokens-00000.tar ... (where SRC itself holds the shards)
                             OUT/tokenizers/{text,image,speech ...}/
                             OUT/settings.json, OUT/roundtrip.png, OUT/roundtrip.wav

A finished shard is a file, and a record of it in the folder `.records` beside it; a run that is killed
loses only the shards it was in the middle of. When all shards of a split are there the manifest is
written and the records go.

Over several machines: `--tokenizers-only`, then `--part K/N` for every K, at the same time, then the plain
command, which does what is missing and writes the manifest. The bytes are those of one process.
"""

import itertools
import json
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.printable import hidden_characters, printable
from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.loss_mask import MASKED_SUFFIX, to_bytes
from data_pipeline.shards.tar import (
    FORMAT,
    MANIFEST,
    TOKENS_SUFFIX,
    Location,
    Sample,
    fits_a_tar,
    read_manifest,
    write_shard,
)
from data_pipeline.shards.vectors import VECTORS_SUFFIX
from data_pipeline.shards.vectors import to_bytes as vectors_to_bytes
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.tokenize.claim import PartOfWork, claimed
from data_pipeline.tokenize.config import TokenizeConfig, load_tokenize_config
from data_pipeline.tokenize.documents import DocumentEncoder, Encoded
from data_pipeline.tokenize.isolated import Refused, use_samples
from data_pipeline.tokenize.layout import SourceSettings
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.registry import named_kind
from data_pipeline.tokenize.roundtrip import show_roundtrip, summary
from data_pipeline.tokenize.sources import Split, commands_of, find_splits
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.tokenizer_set import (
    TOKENIZERS,
    load_tokenizers,
    obtain_tokenizers,
    saved_kinds,
    tokenizer_modules,
    vocabulary_of,
)
from data_pipeline.tokenize.workers import default_processes, run_tasks

SETTINGS = "settings.json"
HOLDS = "token shards"
"""What OUT holds, for messages about an OUT that holds something else."""
_RECORDS = ".records"
_LISTED_SKIPS = 1000
"""Number of skipped samples that the manifest lists with their reasons; all of them are counted."""
_FREE_KEYS = {"max_bad_frac"}
"""Settings that may change when a run is continued: they reach no byte of a shard."""


@dataclass(frozen=True)
class ShardTask:
    """Raw shards that become one token shard."""

    raw_shards: tuple[Location, ...]
    path: Path
    tokenizers: Path
    limits: Limits
    source: SourceSettings

    @property
    def record_path(self) -> Path:
        return self.path.parent / _RECORDS / f"{self.path.name}.json"


def tokenize(
    src: str | Path,
    out: str | Path,
    *,
    config_path: str | Path,
    processes: int | None = None,
    tokenizers_only: bool = False,
) -> dict[str, Any]:
    """Tokenize what OUT does not hold yet of SRC. Returns {split: manifest}; `tokenizers_only`: {}.

    Raises ConfigError (ShardError is one) for whatever a user can mend: no shards in SRC, a damaged shard,
    too many unusable samples, an OUT that holds something else, or one that was begun with other settings or
    with another SRC.
    """
    out = Path(out)
    config, splits, facts = read_source(src, config_path)
    processes = default_processes() if processes is None else processes
    with claimed(out, SETTINGS, facts, HOLDS):
        tokenizers = obtain_tokenizers(config, splits, out / TOKENIZERS, processes)
        if tokenizers_only:
            print(f"{out / TOKENIZERS}: {', '.join(tokenizers)}")
            return {}
        manifests = {
            split.name: _tokenize_split(split, out, config, tokenizers, processes) for split in splits
        }
        show_roundtrip(splits, tokenizers, out, config.limits, config.source)
    print("\n".join(summary(name, manifest, tokenizers) for name, manifest in manifests.items()))
    return manifests


def tokenize_part(
    src: str | Path,
    out: str | Path,
    part: PartOfWork,
    *,
    config_path: str | Path,
    processes: int | None = None,
) -> None:
    """Write the missing token shards of `part`, (k, n): of all splits' shards in a row, every n-th from k on.

    Other parts of the same n may be written at the same time. Raises ConfigError as `tokenize` does, and if
    the tokenizers are not there yet.
    """
    out = Path(out)
    config, splits, facts = read_source(src, config_path)
    if not (out / TOKENIZERS).is_dir():
        raise ConfigError(
            f"{out / TOKENIZERS}: no tokenizers yet, and all parts need the same; make them first, with "
            "--tokenizers-only instead of --part"
        )
    processes = default_processes() if processes is None else processes
    with claimed(out, SETTINGS, facts, HOLDS, part=part):
        number = 0
        for split in splits:
            tasks = plan_tasks(split, out, config)
            tasks_of_part = [task for i, task in enumerate(tasks, number) if i % part[1] == part[0] - 1]
            number += len(tasks)
            if tasks_of_part and not (out / split.name / MANIFEST).exists():
                _run(tasks_of_part, len(tasks), split.name, config, processes)
    print(f"part {part[0]} of {part[1]} is written; when all are, `motley tokenize` without --part finishes")


def unfinished_parts(splits: Sequence[Split], out: Path, config: TokenizeConfig, num_parts: int) -> list[int]:
    """The parts, from 1, that have shards to write; [] also where only manifests are missing."""
    tasks = [(split, task) for split in splits for task in plan_tasks(split, out, config)]
    return sorted(
        {
            1 + number % num_parts
            for number, (split, task) in enumerate(tasks)
            if not (task.record_path.exists() or (out / split.name / MANIFEST).exists())
        }
    )


def read_source(
    src: str | Path, config_path: str | Path
) -> tuple[TokenizeConfig, list[Split], dict[str, Any]]:
    """(config, splits of SRC, the settings that an OUT records when it is begun). Raises ConfigError.

    Where SRC is a `pipe:`, its commands are said on stderr.
    """
    config = load_tokenize_config(config_path)
    splits = find_splits(str(src), config.source.files)
    if commands := commands_of(splits):
        more = f", and {len(commands) - 1} like it" if commands[1:] else ""
        print(
            f"SRC is a command, which is run to read a shard: {printable(commands[0])}{more}", file=sys.stderr
        )
    facts = {
        "config": config.values(exclude=_FREE_KEYS),
        "source": {split.name: dict(split.listing) for split in splits},
    }
    return config, splits, facts


def _tokenize_split(
    split: Split, out: Path, config: TokenizeConfig, tokenizers: Mapping[str, Tokenizer], processes: int
) -> dict[str, Any]:
    """Write what is missing of a split: shards, manifest, index. Returns its manifest."""
    folder = out / split.name
    if not (folder / MANIFEST).exists():
        tasks = plan_tasks(split, out, config)
        records = _run(tasks, len(tasks), split.name, config, processes)
        kinds = saved_kinds(out / TOKENIZERS)
        write_json(
            folder / MANIFEST, make_manifest(split, [records[task] for task in tasks], tokenizers, kinds)
        )
    shutil.rmtree(folder / _RECORDS, ignore_errors=True)
    TokenSource.open(folder)  # makes the index where it is missing, and checks what is there
    return read_manifest(folder)


def plan_tasks(split: Split, out: Path, config: TokenizeConfig) -> list[ShardTask]:
    """One task a token shard, in the order of the raw shards."""
    shards, folder, per_task = split.shards, out / split.name, config.settings.raw_shards_per_shard
    return [
        ShardTask(
            tuple(shards[first : first + per_task]),
            folder / f"tokens-{number:05d}.tar",
            out / TOKENIZERS,
            config.limits,
            config.source,
        )
        for number, first in enumerate(range(0, len(shards), per_task))
    ]


def _run(
    tasks: list[ShardTask], num_in_split: int, split_name: str, config: TokenizeConfig, processes: int
) -> dict[ShardTask, dict[str, Any]]:
    """Write the shards of tasks that have no record on disk. Returns the records of all tasks."""
    tasks[0].record_path.parent.mkdir(parents=True, exist_ok=True)
    old = {task: json.loads(task.record_path.read_text()) for task in tasks if task.record_path.exists()}
    records: dict[ShardTask, dict[str, Any]] = {}
    samples: Counter[str] = Counter()
    missing = [task for task in tasks if task not in old]
    preload = (*tokenizer_modules(tasks[0].tokenizers), *_IMPORTS)
    with (
        run_tasks(write_task, missing, processes, preload=preload) as finished,
        Progress(f"tokenize {split_name}".strip(), len(tasks), "shards", done=len(old)) as progress,
    ):
        for task, record in itertools.chain(old.items(), finished):
            records[task] = record
            samples.update(documents=record["shard"]["documents"], bad=record["num_skipped"])
            _check_bad(samples, records, num_in_split, config.settings.max_bad_frac)
            progress.advance(int(task not in old), **samples)
    return records


_IMPORTS = ("scipy.signal", "PIL.PngImagePlugin")
"""Modules that tokenizers import late; workers are forked from a process that has them."""


def _check_bad(
    samples: Mapping[str, int], records: Mapping[Any, dict[str, Any]], num_tasks: int, max_bad_frac: float
) -> None:
    """Raise ConfigError once more samples are bad than `max_bad_frac` allows of all that are expected.

    `samples`: number of "documents" and of "bad" samples in `records`, those of the shards written so far.
    """
    total = samples["bad"] + samples["documents"]
    if samples["bad"] <= max_bad_frac * total * num_tasks / len(records):
        return
    examples = itertools.islice((skip for record in records.values() for skip in record["skipped"]), 5)
    shown = "".join(f"\n  {skip['shard']} {skip['key']}: {skip['reason']}" for skip in examples)
    raise ConfigError(
        f"{samples['bad']} of the {total} samples read so far cannot be used, more than max_bad_frac = "
        f"{max_bad_frac} allows:{shown}\nMend them and choose another OUT, or raise max_bad_frac and "
        "run this again: finished shards are kept"
    )


@lru_cache(maxsize=1)
def _worker_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    return load_tokenizers(folder)


def write_task(task: ShardTask) -> tuple[ShardTask, dict[str, Any]]:
    """Tokenize the raw shards of a task into its token shard, then record it. Runs in a worker."""
    encoder = DocumentEncoder(_worker_tokenizers(task.tokenizers), task.limits, task.source)
    skipped: list[dict[str, str]] = []
    shard = write_shard(task.path, _encoded(task, encoder, skipped))
    record = {
        "shard": shard,
        "num_skipped": len(skipped),
        "skipped": skipped[:_LISTED_SKIPS],
        "tokens": dict(encoder.tokens),
        "measured": dict(encoder.measured),
        **({"masked_targets": encoder.num_masked} if encoder.num_masked else {}),
    }
    write_json(task.record_path, record)
    return task, record


def _encoded(
    task: ShardTask, encoder: DocumentEncoder, skipped: list[dict[str, str]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, {"ids": bytes}) of each usable sample, with "masked" where some ids are no targets and "vectors"
    where it has some; the others are appended to `skipped`."""
    keys: set[str] = set()

    def encode(key: str, sample: Sample) -> Encoded:
        """The document of a sample. It runs in a process of its own, whose encoder sums up what it needs."""
        _check_key(key, TOKENS_SUFFIX)
        document = encoder.encode(sample, key)
        for suffix in _members(document, encoder.vocabulary):
            _check_key(key, suffix)
        encoder.add(document)
        return document

    for shard, key, made in use_samples(task.raw_shards, encode, task.limits, source=task.source):
        if key in keys:
            made = Refused("its key was there before; keys are not repeated within a token shard")
        keys.add(key)
        if isinstance(made, Refused):
            skipped.append({"shard": str(shard), "key": printable(key), "reason": made.reason})
            continue
        encoder.add(made)
        yield key, _members(made, encoder.vocabulary)


def _members(document: Encoded, vocabulary: Vocabulary) -> dict[str, bytes]:
    """The members of a document in a token shard, by suffix; only the ids are always there."""
    beside = {
        MASKED_SUFFIX: to_bytes(document.masked),
        VECTORS_SUFFIX: vectors_to_bytes(document.vectors, vocabulary),
    }
    return {TOKENS_SUFFIX: document.ids.tobytes()} | {name: data for name, data in beside.items() if data}


def _check_key(key: str, suffix: str) -> None:
    """Raise SampleError for a key that a token shard cannot have as the name of a file of that suffix."""
    path = PurePosixPath(key)
    if hidden_characters(key) or path.is_absolute() or ".." in path.parts:
        raise SampleError("its key is absolute, leads upwards or holds control characters")
    if not fits_a_tar(key, suffix):
        raise SampleError("its key is too long for a tar header")


def make_manifest(
    split: Split,
    records: list[dict[str, Any]],
    tokenizers: Mapping[str, Tokenizer],
    kinds: Mapping[str, str],
) -> dict[str, Any]:
    """The manifest of a split: vocabulary, tokenizers, shards, and sums over the shards' records."""
    measured: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for record in records:
        measured.update(record["measured"])
        tokens.update(record["tokens"])
    vocabulary = vocabulary_of(tokenizers)
    masked = sum(record.get("masked_targets", 0) for record in records)
    return {
        "format": FORMAT,
        **vocabulary.manifest_values(),
        "tokenizers": {
            name: {
                **named_kind(name, kinds[name]),
                "fingerprint": tokenizer.fingerprint,
                "settings": tokenizer.config.model_dump(mode="json"),
            }
            for name, tokenizer in tokenizers.items()
        },
        "num_documents": sum(record["shard"]["documents"] for record in records),
        "tokens": {modality: tokens[modality] for modality in vocabulary.modalities},
        **({"masked_targets": masked} if masked else {}),
        "shards": [record["shard"] for record in records],
        "num_skipped": sum(record["num_skipped"] for record in records),
        "skipped": [skip for record in records for skip in record["skipped"]][:_LISTED_SKIPS],
        "measured": dict(measured),
        "source": {"split": split.name, "shards": dict(split.listing)},
    }
