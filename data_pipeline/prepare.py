"""`motley tokenize`: raw shards -> token shards, parallel over shards, continued after any interruption.

    SRC/train/*.tar      ->  OUT/train/tokens-00000.tar ..., manifest.json
    SRC/heldout/*.tar    ->  OUT/heldout/ ...
    SRC/*.tar            ->  OUT/tokens-00000.tar ... (where SRC itself holds the shards)
                             OUT/tokenizers/{text,image,speech}/
                             OUT/settings.json, OUT/roundtrip.png, OUT/roundtrip.wav

A finished shard is a file plus a record in a `.records` folder beside it; a run that was killed loses the shards it
was in. The manifest is written when all shards of a split are there, and the records go.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config import TokenizeConfig
from data_pipeline.progress import Progress
from data_pipeline.raw import SampleError, parse_document
from data_pipeline.roundtrip import show_roundtrip, summary
from data_pipeline.shards import (
    FORMAT,
    MANIFEST,
    TOKENS_SUFFIX,
    fits_a_tar,
    read_manifest,
    read_samples,
    verify_shards,
    write_json,
    write_shard,
)
from data_pipeline.sources import Split, find_splits
from data_pipeline.speech import RATE_HZ
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.tokenizer_set import TOKENIZERS, load_tokenizers, obtain_tokenizers, vocabulary_of
from data_pipeline.toml_config import ConfigError, load_config
from data_pipeline.vocabulary import BOS, DELIMITERS, EOS, TEXT, Vocabulary
from data_pipeline.workers import default_processes, run_tasks

SETTINGS = "settings.json"
_RECORDS = ".records"
_MEASURED_PER_SHARD = 16
"""Pictures of a shard that are decoded again to measure the round trip."""
_LISTED_SKIPS = 1000
"""Skipped samples that the manifest lists; all are counted."""


@dataclass(frozen=True)
class ShardTask:
    """Raw shards that become one token shard."""

    raw_shards: tuple[str, ...]
    path: Path
    tokenizers: Path

    @property
    def record_path(self) -> Path:
        return self.path.parent / _RECORDS / f"{self.path.name}.json"


def tokenize(
    src: str | Path, out: str | Path, *, config_path: str | Path, processes: int | None = None
) -> dict[str, Any]:
    """Tokenize every split of SRC that OUT does not hold yet. Returns {split: manifest}.

    Raises ConfigError (or ShardError, which is one) for anything a user can mend: see `find_splits`, `_claim`,
    `obtain_tokenizers`, `_check_bad`.
    """
    out = Path(out)
    config = load_config(TokenizeConfig, config_path)
    splits = find_splits(str(src))
    _claim(out, config, splits)
    processes = processes or default_processes()
    tokenizers = obtain_tokenizers(config, splits, out / TOKENIZERS)
    manifests = {
        split.name: _tokenize_split(split, out / split.name, config, tokenizers, out / TOKENIZERS, processes)
        for split in splits
    }
    show_roundtrip(splits, tokenizers, out)
    print("\n".join(summary(name, manifest) for name, manifest in manifests.items()))
    return manifests


def _claim(out: Path, config: TokenizeConfig, splits: list[Split]) -> None:
    """Write the settings first; refuse an OUT that was begun with others, naming what differs."""
    settings = config.model_dump(mode="json", exclude={"max_bad_frac"})  # it changes no byte that is written
    ours = {
        "config": settings,
        "source": {split.name: [list(shard) for shard in split.listing] for split in splits},
    }
    path = out / SETTINGS
    try:
        if path.exists():
            theirs = json.loads(path.read_text())
            if theirs != ours:
                raise ConfigError(
                    f"{out} was made otherwise: {_differences(theirs, ours)}; choose another folder"
                )
            return
        if out.exists() and any(out.iterdir()):
            raise ConfigError(
                f"{out} is not empty and was not begun by `motley tokenize`; choose another folder"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, ours)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error}") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    found = []
    for field in sorted(theirs["config"].keys() | ours["config"].keys()):
        there, now = theirs["config"].get(field), ours["config"].get(field)
        if isinstance(there, dict) and isinstance(now, dict):
            found += [
                f"{field}.{k}: there {there.get(k)}, now {now.get(k)}" for k in now if there.get(k) != now[k]
            ]
        elif there != now:
            found.append(f"{field}: there {there}, now {now}")
    if theirs["source"].keys() != ours["source"].keys():
        found.append(f"splits of SRC: there {sorted(theirs['source'])}, now {sorted(ours['source'])}")
    else:
        for name, shards in ours["source"].items():
            old = theirs["source"][name]
            if old != shards:
                first = next(iter([b for a, b in zip(old, shards, strict=False) if a != b]), None)
                what = f"first at {first}" if first else f"there {len(old)}, now {len(shards)}"
                found.append(f"raw shards of {name or 'SRC'} (name, bytes): {what}")
    return "; ".join(found)


def _tokenize_split(
    split: Split,
    folder: Path,
    config: TokenizeConfig,
    tokenizers: Mapping[str, Tokenizer],
    tokenizer_folder: Path,
    processes: int,
) -> dict[str, Any]:
    if (folder / MANIFEST).exists():
        verify_shards(folder, checksums=False)
        return read_manifest(folder)
    tasks = plan_tasks(split, folder, config.raw_shards_per_shard, tokenizer_folder)
    (folder / _RECORDS).mkdir(parents=True, exist_ok=True)
    records = {task: json.loads(task.record_path.read_text()) for task in tasks if task.record_path.exists()}
    missing = [task for task in tasks if task not in records]
    with Progress(f"tokenize {split.name}".strip(), len(tasks), "shards", done=len(records)) as progress:
        _check_bad(records, len(tasks), config, split)
        for task, record in run_tasks(write_task, missing, processes, preload=_IMPORTS):
            records[task] = record
            _check_bad(records, len(tasks), config, split)
            progress.advance(
                documents=sum(record["shard"]["documents"] for record in records.values()),
                bad=sum(record["num_skipped"] for record in records.values()),
            )
    manifest = _manifest(split, [records[task] for task in tasks], tokenizers)
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / _RECORDS)
    return manifest


_IMPORTS = ("data_pipeline.tokenizer_set", "scipy.signal", "scipy.io.wavfile", "PIL.PngImagePlugin")


def plan_tasks(split: Split, folder: Path, raw_shards_per_shard: int, tokenizers: Path) -> list[ShardTask]:
    """One task a token shard, in the order of the raw shards."""
    urls = split.urls
    return [
        ShardTask(
            tuple(urls[first : first + raw_shards_per_shard]), folder / f"tokens-{number:05d}.tar", tokenizers
        )
        for number, first in enumerate(range(0, len(urls), raw_shards_per_shard))
    ]


def _check_bad(
    records: Mapping[ShardTask, Any], num_tasks: int, config: TokenizeConfig, split: Split
) -> None:
    """Raise ConfigError as soon as the skipped samples must pass `max_bad_frac` of all that are expected."""
    bad = sum(record["num_skipped"] for record in records.values())
    seen = bad + sum(record["shard"]["documents"] for record in records.values())
    expected = seen * num_tasks / len(records) if records else 0
    if bad <= config.max_bad_frac * expected:
        return
    examples = [skip for record in records.values() for skip in record["skipped"]][:5]
    shown = "\n".join(f"  {skip['shard']} {skip['key']}: {skip['reason']}" for skip in examples)
    raise ConfigError(
        f"{bad} of {seen} samples of {split.name or 'SRC'} so far cannot be used, more than max_bad_frac = "
        f"{config.max_bad_frac} allows:\n{shown}\nMend them, or raise max_bad_frac and run this again: finished "
        "shards are kept"
    )


@lru_cache(maxsize=1)
def _worker_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    return load_tokenizers(folder)


def write_task(task: ShardTask) -> tuple[ShardTask, dict[str, Any]]:
    """Tokenize the raw shards of a task into its token shard, and record it. Runs in a worker."""
    encoder = DocumentEncoder(_worker_tokenizers(task.tokenizers))
    shard = write_shard(task.path, _encoded(task, encoder))
    record = {
        "shard": shard,
        "skipped": encoder.skipped[:_LISTED_SKIPS],
        "num_skipped": len(encoder.skipped),
        "tokens": dict(encoder.tokens),
        "measured": dict(encoder.measured),
    }
    write_json(task.record_path, record)
    return task, record


def _encoded(task: ShardTask, encoder: "DocumentEncoder") -> Iterator[tuple[str, dict[str, bytes]]]:
    seen: set[str] = set()
    for url in task.raw_shards:
        for key, sample in read_samples(url):
            try:
                if key in seen:
                    raise SampleError("its key occurs twice in the shard")
                seen.add(key)
                if not key or not fits_a_tar(key, TOKENS_SUFFIX):
                    raise SampleError("its key is empty or too long for a tar")
                ids = encoder.encode(sample)
            except SampleError as error:
                encoder.skipped.append({"shard": url, "key": key, "reason": str(error)})
                continue
            yield key, {TOKENS_SUFFIX: ids.tobytes()}


class DocumentEncoder:
    """Samples -> token ids, counting as it goes. Its one state is the counts."""

    def __init__(self, tokenizers: Mapping[str, Tokenizer]) -> None:
        self.tokenizers = tokenizers
        self.vocabulary: Vocabulary = vocabulary_of(tokenizers)
        self.skipped: list[dict[str, str]] = []
        self.tokens: Counter[str] = Counter()
        self.measured: Counter[str] = Counter()

    def encode(self, sample: Mapping[str, bytes]) -> np.ndarray:
        """Ids [n] in the vocabulary's dtype: <bos> parts <eos>. Raises SampleError, having counted nothing."""
        parts = parse_document(sample)
        ids: list[np.ndarray] = [np.array([BOS])]
        measured: Counter[str] = Counter()
        for part in parts:
            if part.kind not in self.tokenizers:
                raise SampleError(
                    f"has a part of {part.kind}, for which the config has no table [{part.kind}]"
                )
            tokenizer = self.tokenizers[part.kind]
            content = tokenizer.read(part.content)
            codes = tokenizer.encode(content)
            measured.update(self._measure(part.kind, content, codes))
            if part.kind == TEXT:
                ids.append(codes)
            else:
                before, after = DELIMITERS[part.kind]
                ids += [np.array([before]), codes + self.vocabulary.start(part.kind), np.array([after])]
        joined = np.concatenate([*ids, np.array([EOS])]).astype(self.vocabulary.dtype)
        if len(joined) == 2:
            raise SampleError("all its parts are empty")
        modality = np.bincount(self.vocabulary.modality_of(joined), minlength=len(self.vocabulary.sizes))
        self.tokens.update(dict(zip(self.vocabulary.modalities, modality.tolist(), strict=True)))
        self.measured.update(measured)
        return joined

    def _measure(self, kind: str, content: Any, codes: np.ndarray) -> dict[str, float]:
        if kind == TEXT:
            return {"text_bytes": len(content.encode()), "text_tokens": len(codes)}
        if kind == "speech":
            return {"speech_s": len(content) / RATE_HZ, "speech_units": len(codes)}
        if self.measured["pictures"] >= _MEASURED_PER_SHARD:
            return {}
        error = self.tokenizers[kind].decode(codes).astype(np.float64) - content
        return {"pictures": 1, "picture_values": error.size, "picture_squared_error": float((error**2).sum())}


def _manifest(
    split: Split, records: list[dict[str, Any]], tokenizers: Mapping[str, Tokenizer]
) -> dict[str, Any]:
    vocabulary = vocabulary_of(tokenizers)
    tokens = {m: sum(record["tokens"].get(m, 0) for record in records) for m in vocabulary.modalities}
    measured: Counter[str] = Counter()
    for record in records:
        measured.update(record["measured"])
    return {
        "format": FORMAT,
        "vocabulary": vocabulary.sizes,
        "tokenizers": {
            name: {"fingerprint": tokenizer.fingerprint, "settings": dict(tokenizer.settings)}
            for name, tokenizer in tokenizers.items()
        },
        "num_documents": sum(record["shard"]["documents"] for record in records),
        "tokens": tokens,
        "shards": [record["shard"] for record in records],
        "num_skipped": sum(record["num_skipped"] for record in records),
        "skipped": [skip for record in records for skip in record["skipped"]][:_LISTED_SKIPS],
        "measured": dict(measured),
        "source": {"split": split.name, "shards": [list(shard) for shard in split.listing]},
    }
