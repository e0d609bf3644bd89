"""The tokenizers of a data set together: fit, save, load, and the vocabulary that they make."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.files.progress import Progress
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import read_samples
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.tokenize.config import TokenizeConfig
from data_pipeline.tokenize.image import PatchTokenizer, fit_patches, fit_picture, read_picture
from data_pipeline.tokenize.raw import SampleError, parse_document
from data_pipeline.tokenize.sources import Split
from data_pipeline.tokenize.speech import UnitTokenizer, fit_units, read_wave
from data_pipeline.tokenize.text import TextTokenizer, fit_text
from data_pipeline.tokenize.tokenizer import Tokenizer
from data_pipeline.tokenize.workers import run_tasks

TOKENIZERS = "tokenizers"
_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    TEXT: TextTokenizer.load,
    "image": PatchTokenizer.load,
    "speech": UnitTokenizer.load,
}
"""In the order of the id space."""
_FROM_A_SHARD = 50
"""Fit on at least so many documents of a shard before taking another shard: opening one has its price."""


def vocabulary_of(tokenizers: Mapping[str, Tokenizer]) -> Vocabulary:
    """The id space of tokenizers, in their order and of their actual sizes."""
    return Vocabulary(sizes={name: tokenizer.size for name, tokenizer in tokenizers.items()})


def load_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers saved in a folder, text first. Raises ConfigError if it holds none, or changed ones."""
    found = {name: load(folder / name) for name, load in _LOADERS.items() if (folder / name).is_dir()}
    if TEXT not in found:
        raise ConfigError(f"{folder}: no tokenizers here (expected folders such as {folder / TEXT})")
    return found


def obtain_tokenizers(
    config: TokenizeConfig, splits: list[Split], folder: Path, processes: int
) -> dict[str, Tokenizer]:
    """Load from `folder`; where it is not there yet, fit them or copy those of `tokenizers_from` into it."""
    if not folder.exists():
        draft = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        if config.tokenizers_from is not None:
            load_tokenizers(Path(config.tokenizers_from))
            shutil.copytree(config.tokenizers_from, draft)
        else:
            _fit_all(config, splits, draft, processes)
        draft.rename(folder)
    return load_tokenizers(folder)


@dataclass(frozen=True)
class FitTask:
    """One tokenizer to fit, on documents of some raw shards."""

    kind: str
    config: TokenizeConfig
    urls: tuple[str, ...]
    folder: Path


def _fit_all(config: TokenizeConfig, splits: list[Split], draft: Path, processes: int) -> None:
    """Fit a tokenizer for each table of the config, on documents of the split `fit_split`."""
    names = [split.name for split in splits]
    if names != [""] and config.fit_split not in names:
        raise ConfigError(
            f'fit_split = "{config.fit_split}": SRC has no such folder of shards; it has {", ".join(names)}'
        )
    split = next(split for split in splits if split.name in ("", config.fit_split))
    urls = tuple(split.urls[:: max(1, len(split.urls) * _FROM_A_SHARD // config.fit_documents)])
    kinds = [
        kind for kind in reversed(tuple(_LOADERS)) if getattr(config, kind) is not None
    ]  # the slowest first
    tasks = [FitTask(kind, config, urls, draft / kind) for kind in kinds]
    with (
        run_tasks(fit_task, tasks, processes, preload=("sklearn.cluster",)) as sizes,
        Progress("fit tokenizers", len(tasks), "tokenizers") as progress,
    ):
        for kind, size in sizes:
            progress.advance(**{kind: size})


def fit_task(task: FitTask) -> tuple[str, int]:
    """Fit and save one tokenizer. Returns (kind, number of codes). Runs in a worker."""
    config, tokenizer = task.config, None
    if task.kind == TEXT and (text := config.text) is not None:
        tokenizer = fit_text(_sample(task, str), text)
    elif task.kind == "image" and (image := config.image) is not None:
        pictures = _sample(task, lambda data: fit_picture(read_picture(data), image))
        tokenizer = fit_patches(pictures, image, config.seed)
    elif task.kind == "speech" and (speech := config.speech) is not None:
        tokenizer = fit_units(_sample(task, read_wave), speech, config.seed)
    assert tokenizer is not None, task.kind
    tokenizer.save(task.folder)
    return task.kind, tokenizer.size


def _sample(task: FitTask, read: Callable[[Any], Any]) -> list[Any]:
    """Contents of a kind in about `fit_documents` documents, the first ones of each shard.

    Bad samples are left out here: they are named and counted when they are tokenized. Raises ConfigError if
    that leaves nothing.
    """
    per_shard = -(-task.config.fit_documents // len(task.urls))
    contents: list[Any] = []
    bad: list[str] = []
    for url in task.urls:
        for key, sample in itertools.islice(read_samples(url), per_shard):
            try:
                contents += [read(part.content) for part in parse_document(sample) if part.kind == task.kind]
            except SampleError as error:
                bad.append(f"{url} {key}: {error}")
    if not contents:
        reason = f"; of {len(bad)} unusable samples the first is {bad[0]}" if bad else ""
        advice = (
            "Data without text takes its special tokens from other data: set tokenizers_from"
            if task.kind == TEXT
            else f"If there is none in your data, remove the table [{task.kind}]"
        )
        raise ConfigError(
            f"no {task.kind} to fit a tokenizer on in {task.urls[0]} and the shards like it{reason}. {advice}"
        )
    return contents
