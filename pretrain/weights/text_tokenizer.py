"""The text tokenizer that weights belong to: found, compared with that of a run's data, and exported."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.pretrained_text import PretrainedConfig
from data_pipeline.tokenize.registry import default_kind, load_kind
from data_pipeline.tokenize.tokenizer_json import tokenizer_files
from data_pipeline.tokenize.tokenizer_set import load_tokenizers
from pretrain.config import RunConfig
from pretrain.run_tokenizers import tokenizers_of_run
from pretrain.weights.folder import WeightSource
from pretrain.weights.hugging_face import CONFIG as HUGGING_FACE
from pretrain.weights.warm_start import check_fingerprints

UNCHECKED = "--unchecked-ids imports them without this check"


def checked_ids(
    source: WeightSource, data: str, manifest: Mapping[str, Any] | None, tokenizer: Path | None
) -> WeightSource:
    """`source`, whose ids mean what they mean in a run's data, with the number of ids that it knows.

    `data`: the folder of token shards; `manifest`: None if it is not there. `tokenizer`: the file of a model
    of Hugging Face, or its folder; None: that of the weights. Raises ConfigError where ids differ, or where
    nobody can tell.
    """
    if (source.path / HUGGING_FACE).is_file():
        if manifest is None:
            raise ConfigError(
                f"{data}: the data is not tokenized yet, so its ids cannot be compared with those of "
                f"{source.path}; tokenize it first. {UNCHECKED}"
            )
        num_ids = _text_ids(source, data, manifest, tokenizer or source.path)
        return replace(source, vocabulary={TEXT: num_ids})
    if tokenizer is not None:
        raise ConfigError(
            f"--tokenizer {tokenizer}: {source.path} names its tokenizers itself; leave the option out"
        )
    if manifest is not None:
        check_fingerprints(
            source, {name: e["fingerprint"] for name, e in manifest["tokenizers"].items()}, data
        )
    return source


def _text_ids(source: WeightSource, data: str, manifest: Mapping[str, Any], path: Path) -> int:
    """The number of ids of the tokenizer at `path`, which made the data's text ids. Raises ConfigError."""
    entry = manifest["tokenizers"][TEXT]
    kind = entry.get("kind", default_kind(TEXT))
    definition = load_kind(TEXT, kind, f"{data}: tokenizers.{TEXT}.kind")
    advice = (
        f'tokenize the data with [text] kind = "huggingface" (or "sentencepiece") and file = "{path}". '
        f"{UNCHECKED}"
    )
    if not issubclass(definition.config, PretrainedConfig):
        raise ConfigError(
            f'{data}: its text ids are of a tokenizer of kind "{kind}", which {source.path} was not trained '
            f"with: the same ids mean other words; {advice}"
        )
    values = {**entry["settings"], "file": str(path)}
    try:
        made: Any = definition.fit((), validate(definition.config, values, str(path)), 0)
        fingerprint = made.fingerprint
    except ConfigError as error:
        raise ConfigError(
            f"{source.path}: which tokenizer it was trained with is not known ({error}); name its file with "
            f"--tokenizer PATH. {UNCHECKED}"
        ) from None
    if fingerprint != entry["fingerprint"]:
        raise ConfigError(
            f"{path}: not the tokenizer that made {data} (fingerprint {fingerprint}, there "
            f"{entry['fingerprint']}): the same ids mean other words; {advice}. Of weights that Motley "
            "exported for such data, --tokenizer names the file that the data was made with"
        )
    if source.model.vocab_tokens < made.codec.num_ids:
        raise ConfigError(
            f"{source.path}: rows for {source.model.vocab_tokens} ids, but {path} has {made.codec.num_ids}: "
            "not its tokenizer; name the right one with --tokenizer PATH"
        )
    return made.codec.num_ids


def exported_files(source: WeightSource, config: RunConfig | None, folder: Path | None) -> dict[str, Any]:
    """File name -> JSON value of the text tokenizer of weights, for transformers. `config`: of the run that
    the weights are of; None without one. `folder`: of the tokenizers; None: beside the data of the run.

    Raises ConfigError where there is none, one of other weights, or one that transformers has no form for.
    """
    if config is not None:
        text = tokenizers_of_run(source.path, config, folder)[TEXT]
    elif folder is not None:
        text = load_tokenizers(folder)[TEXT]
    else:
        raise ConfigError("weights alone do not say which tokenizers made their ids; --tokenizers DIR does")
    expected = (source.tokenizers or {}).get(TEXT, text.fingerprint)
    if text.fingerprint != expected:
        raise ConfigError(
            f"--tokenizers {folder}: the text tokenizer there is {text.fingerprint}, that of {source.path} "
            f"is {expected}; name the tokenizers of its data"
        )
    return tokenizer_files(text)
