"""The tokenizers of a data set together: fit them, open them, and the vocabulary that they make."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.printable import printable
from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Location, Sample
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.tokenize.config import TokenizeConfig, TokenizerTable, modality_order
from data_pipeline.tokenize.isolated import Refused, use_samples
from data_pipeline.tokenize.kinds import huggingface, sentencepiece_model
from data_pipeline.tokenize.layout import SourceSettings
from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.pretrained_text import PretrainedText
from data_pipeline.tokenize.registry import load_kind, module_of, open_tokenizer, save_tokenizer, saved_kind
from data_pipeline.tokenize.sources import Split
from data_pipeline.tokenize.tokenizer import Tokenizer, TokenizerKind, vector_format
from data_pipeline.tokenize.workers import run_tasks

TOKENIZERS = "tokenizers"
_FOREIGN = {huggingface.FILE: "huggingface", **dict.fromkeys(sentencepiece_model.FILES, "sentencepiece")}
"""File of a text tokenizer that was trained elsewhere -> the kind that reads it."""
_MIN_FROM_A_SHARD = 50
"""Fit on at least so many documents of a shard before opening another shard, which takes time."""


def vocabulary_of(tokenizers: Mapping[str, Tokenizer]) -> Vocabulary:
    """The id space of tokenizers, in their order and of their actual sizes."""
    sizes = {name: Vocabulary.size_of(name, tokenizer.size) for name, tokenizer in tokenizers.items()}
    formats = {name: vector_format(tokenizer) for name, tokenizer in tokenizers.items()}
    vectors = {name: of for name, of in formats.items() if of is not None}
    text = tokenizers[TEXT]
    if isinstance(text, PretrainedText):
        return Vocabulary(sizes=sizes, special_ids=text.special_ids, vectors=vectors)
    return Vocabulary(sizes=sizes, vectors=vectors)


def saved_kinds(folder: Path) -> dict[str, str]:
    """Modality -> kind of the tokenizers saved in a folder, in the order of the id space. Raises ConfigError
    without one of text.
    """
    saved = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    if TEXT not in saved:
        files = [path.name for path in folder.glob("*") if path.name in _FOREIGN] if folder.is_dir() else []
        advice = (
            f'; for {files[0]}: [{TEXT}] kind = "{_FOREIGN[files[0]]}", file = "{folder}"' if files else ""
        )
        raise ConfigError(f"{folder}: no tokenizers here (expected folders such as {folder / TEXT}){advice}")
    return {name: saved_kind(folder / name, name) for name in modality_order(saved)}


def tokenizer_modules(folder: Path) -> list[str]:
    """The modules that define the tokenizers saved in a folder."""
    return [module_of(modality, kind) for modality, kind in saved_kinds(folder).items()]


def load_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers saved in a folder, text first. Raises ConfigError if it holds none, or changed ones."""
    return {name: open_tokenizer(folder / name, name) for name in saved_kinds(folder)}


def obtain_tokenizers(
    config: TokenizeConfig, splits: list[Split], folder: Path, processes: int
) -> dict[str, Tokenizer]:
    """Load from `folder`; where it is not there yet, fit them or copy those of `tokenizers_from` into it."""
    if not folder.exists():
        draft = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        if config.settings.tokenizers_from is not None:
            load_tokenizers(Path(config.settings.tokenizers_from))
            shutil.copytree(config.settings.tokenizers_from, draft)
        else:
            _fit_all(config, splits, draft, processes)
        draft.rename(folder)
    return load_tokenizers(folder)


@dataclass(frozen=True)
class FitTask:
    """One tokenizer to fit, on documents of some raw shards."""

    modality: str
    table: TokenizerTable
    seed: int
    shards: tuple[Location, ...]
    documents_per_shard: int
    folder: Path
    limits: Limits
    source: SourceSettings


def _fit_all(config: TokenizeConfig, splits: list[Split], draft: Path, processes: int) -> None:
    """Fit a tokenizer for each table of the config, on documents of the split `fit_split`."""
    settings = config.settings
    names = [split.name for split in splits]
    if names != [""] and settings.fit_split not in names:
        raise ConfigError(
            f'fit_split = "{settings.fit_split}": SRC has no such folder of shards; it has {", ".join(names)}'
        )
    split = next(split for split in splits if split.name in ("", settings.fit_split))
    every = max(1, len(split.listing) * _MIN_FROM_A_SHARD // settings.fit_documents)
    shards = tuple(split.shards[::every])
    per_shard = -(-settings.fit_documents // len(shards))
    tasks = [
        FitTask(
            modality, table, settings.seed, shards, per_shard, draft / modality, config.limits, config.source
        )
        for modality, table in list(config.tables.items())[::-1]  # text, the quickest, is fitted last
    ]
    with (
        run_tasks(fit_task, tasks, processes, preload=("sklearn.cluster",)) as sizes,
        Progress("fit tokenizers", len(tasks), "tokenizers") as progress,
    ):
        found = {}
        for modality, size in sizes:
            found[modality] = size
            progress.advance(**{modality: size})
    for modality, table in config.tables.items():
        if (line := _fewer_than_asked(modality, table, found[modality])) is not None:
            print(line, flush=True)


def _fewer_than_asked(modality: str, table: TokenizerTable, size: int) -> str | None:
    """A warning if a fitted tokenizer has fewer codes than its table asks for; None if it has as many."""
    asked = table.config.asked_size
    if asked is None or size >= asked:
        return None
    return (
        f"warning: {modality}: the tokenizer has {size} codes where its table asks for {asked}: the "
        f"documents that it was fitted on hold no more different ones; fit on more (fit_documents), or ask "
        f"for fewer"
    )


def fit_task(task: FitTask) -> tuple[str, int]:
    """Fit and save one tokenizer. Returns (modality, number of codes). Runs in a worker."""
    kind, config = task.table.kind, task.table.config
    definition = load_kind(task.modality, kind, f"{task.modality}.kind")
    tokenizer = definition.fit(_contents(task, definition), config, task.seed)
    save_tokenizer(task.folder, task.modality, kind, tokenizer)
    return task.modality, tokenizer.size


def _contents(task: FitTask, definition: TokenizerKind) -> Iterator[Any]:
    """Contents of the task's modality in the first documents of each shard.

    Unusable samples are left out here: they are named and counted when they are tokenized. Raises ConfigError
    at the end if that leaves nothing.
    """
    count = 0
    unusable: list[str] = []

    def read(key: str, sample: Sample) -> list[Any]:
        found = parts_within(sample, task.limits, key=key, source=task.source)
        parts = [part for part in found if part.modality == task.modality]
        return [definition.read(part.data, task.table.config) for part in parts]

    for shard, key, made in use_samples(
        task.shards, read, task.limits, per_shard=task.documents_per_shard, source=task.source
    ):
        if isinstance(made, Refused):
            unusable.append(f"{shard} {printable(key)}: {made.reason}")
            continue
        count += len(made)
        yield from made
    if not count:
        reason = f"; of {len(unusable)} unusable samples the first is {unusable[0]}" if unusable else ""
        advice = (
            "Data without text takes its special tokens from other data: set tokenizers_from"
            if task.modality == TEXT
            else f"If there is none in your data, remove the table [{task.modality}]"
            if not unusable
            else "`motley look` on the folder says what its samples hold"
        )
        raise ConfigError(
            f"no {task.modality} to fit a tokenizer on in {task.shards[0]} and the shards like it{reason}. "
            f"{advice}"
        )
