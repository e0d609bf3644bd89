"""The tokenizers of a data set together: fit, save, load, and the vocabulary that they make."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_pipeline.config import TokenizeConfig
from data_pipeline.image import PatchTokenizer, fit_patches, fit_picture, read_picture
from data_pipeline.progress import Progress
from data_pipeline.raw import SampleError, parse_document
from data_pipeline.shards import read_samples
from data_pipeline.sources import Split
from data_pipeline.speech import UnitTokenizer, fit_units, read_wave
from data_pipeline.text import TextTokenizer, fit_text
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.toml_config import ConfigError
from data_pipeline.vocabulary import Vocabulary

TOKENIZERS = "tokenizers"
_FROM_A_SHARD = 50
"""Fit on at least so many documents of a shard before taking another shard: opening one has its price."""
_LOADERS: Mapping[str, Callable[[Path], Tokenizer]] = {
    "text": TextTokenizer.load,
    "image": PatchTokenizer.load,
    "speech": UnitTokenizer.load,
}


def vocabulary_of(tokenizers: Mapping[str, Tokenizer]) -> Vocabulary:
    """The id space of tokenizers given in the order of `_LOADERS`, of their actual sizes."""
    return Vocabulary(sizes={name: tokenizer.size for name, tokenizer in tokenizers.items()})


def load_tokenizers(folder: Path) -> dict[str, Tokenizer]:
    """The tokenizers saved in a folder, text first. Raises ConfigError if it holds none."""
    found = {name: load(folder / name) for name, load in _LOADERS.items() if (folder / name).is_dir()}
    if "text" not in found:
        raise ConfigError(f"{folder}: no tokenizers here (expected sub-folders such as {folder}/text)")
    return found


def obtain_tokenizers(config: TokenizeConfig, splits: list[Split], folder: Path) -> dict[str, Tokenizer]:
    """Load from `folder`; when it is not there yet, fit them or copy those of `tokenizers_from` into it."""
    if not folder.exists():
        draft = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        if config.tokenizers_from is not None:
            load_tokenizers(Path(config.tokenizers_from))
            shutil.copytree(config.tokenizers_from, draft)
        else:
            for name, tokenizer in fit_tokenizers(config, splits).items():
                tokenizer.save(draft / name)
        draft.rename(folder)
    return load_tokenizers(folder)


def fit_tokenizers(config: TokenizeConfig, splits: list[Split]) -> dict[str, Tokenizer]:
    """Fit a tokenizer for each table of the config on documents of the split `fit_split`."""
    names = [split.name for split in splits]
    if names != [""] and config.fit_split not in names:
        raise ConfigError(
            f'fit_split = "{config.fit_split}": SRC has no such sub-folder of shards; it has {names}'
        )
    split = next(split for split in splits if split.name in ("", config.fit_split))
    fitters: dict[str, tuple[Callable[[Any], Any], Callable[[list[Any]], Tokenizer]]] = {}
    if (text := config.text) is not None:
        fitters["text"] = str, lambda contents: fit_text(contents, text)
    if (image := config.image) is not None:
        fitters["image"] = (
            lambda data: fit_picture(read_picture(data), image),
            lambda contents: fit_patches(contents, image, config.seed),
        )
    if (speech := config.speech) is not None:
        fitters["speech"] = read_wave, lambda contents: fit_units(contents, speech, config.seed)
    with Progress("fit tokenizers", len(fitters) + 1, "steps") as progress:
        contents = _sample(split, config.fit_documents, {name: read for name, (read, _) in fitters.items()})
        progress.advance()
        fitted = {}
        for name, (_, fit) in fitters.items():
            fitted[name] = fit(contents[name])
            progress.advance(**{name: fitted[name].size})
    return fitted


def _sample(
    split: Split, num_documents: int, readers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, list[Any]]:
    """Contents of the usable parts of about `num_documents` documents: the first ones of shards spread evenly."""
    urls = split.urls[:: max(1, len(split.urls) * _FROM_A_SHARD // num_documents)]
    per_shard = -(-num_documents // len(urls))
    contents: dict[str, list[Any]] = {kind: [] for kind in readers}
    for url in urls:
        for _, sample in itertools.islice(read_samples(url), per_shard):
            try:
                for part in parse_document(sample):
                    if part.kind in readers:
                        contents[part.kind].append(readers[part.kind](part.content))
            except SampleError:
                continue  # named and counted when it is tokenized
    return contents
