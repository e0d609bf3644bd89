"""Which kinds of tokenizer there are, and tokenizers in folders: saved with their kind, opened by it."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.tokenizer import Tokenizer, TokenizerKind

KINDS: Mapping[str, Mapping[str, str]] = {
    TEXT: {
        "bpe": "data_pipeline.tokenize.kinds.bpe",
        "huggingface": "data_pipeline.tokenize.kinds.huggingface",
        "sentencepiece": "data_pipeline.tokenize.kinds.sentencepiece_model",
    },
    "image": {
        "patch_kmeans": "data_pipeline.tokenize.kinds.patch_kmeans",
        "patches": "data_pipeline.tokenize.kinds.patches",
    },
    "speech": {"log_mel_kmeans": "data_pipeline.tokenize.kinds.log_mel_kmeans"},
}
"""Modality -> kind -> the module that defines it. A modality's first kind is its default, also for folders
that are older than kinds. A kind may also be the dotted path of a module, and must be for other modalities.
"""
SETTINGS = "settings.json"


def default_kind(modality: str) -> str | None:
    """The kind of a table that names none; None for a modality that must name one."""
    return next(iter(KINDS.get(modality, ())), None)


def module_of(modality: str, kind: str) -> str:
    """The dotted path of the module that defines a kind: a registered one, or `kind` itself."""
    return KINDS.get(modality, {}).get(kind, kind)


def load_kind(modality: str, kind: object, where: str) -> TokenizerKind:
    """The definition of a kind, imported now. Raises ConfigError, which begins with `where`: a file and a
    field.
    """
    legal = [f'"{name}"' for name in KINDS.get(modality, ())]
    advice = f"legal: {', '.join([*legal, 'the dotted path of a module that defines TOKENIZER'])}"
    if not isinstance(kind, str) or not ("." in kind or kind in KINDS.get(modality, ())):
        raise ConfigError(f"{where} = {json.dumps(kind)}: no such tokenizer of {modality}; {advice}")
    path = module_of(modality, kind)
    try:
        module = importlib.import_module(path)
    except (ImportError, ValueError) as error:
        package = getattr(error, "name", None) or path
        if not f"{path}.".startswith(f"{package}."):
            raise ConfigError(
                f'{where} = "{kind}": {path} needs the package {package}, which is not installed; install '
                "it, or choose another kind"
            ) from None
        raise ConfigError(f'{where} = "{kind}": {path} cannot be imported ({error}); {advice}') from None
    definition = getattr(module, "TOKENIZER", None)
    if not isinstance(definition, TokenizerKind):
        raise ConfigError(f'{where} = "{kind}": {path} defines no TOKENIZER; {advice}')
    return definition


def save_tokenizer(folder: Path, modality: str, kind: str, tokenizer: Tokenizer) -> None:
    """Write a tokenizer into a new folder, with what `open_tokenizer` needs to know of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    settings = tokenizer.config.model_dump(mode="json")
    write_json(
        folder / SETTINGS,
        {**named_kind(modality, kind), "fingerprint": tokenizer.fingerprint, "settings": settings},
    )


def open_tokenizer(folder: Path, modality: str) -> Tokenizer:
    """The tokenizer saved in a folder. Raises ConfigError if there is none, or if its files were changed."""
    saved = _read_settings(folder)
    kind = saved.get("kind", default_kind(modality))
    definition = load_kind(modality, kind, f"{folder / SETTINGS}: kind")
    config = validate(definition.config, saved["settings"], str(folder / SETTINGS))
    try:
        tokenizer = definition.open(folder, config)
    except (ConfigError, OSError):
        raise
    except Exception as error:  # of any library that reads one: numpy and zipfile alone raise five kinds
        files = ", ".join(sorted(path.name for path in folder.iterdir() if path.name != SETTINGS))
        raise ConfigError(
            f"{folder}: {files} cannot be read ({type(error).__name__}: {error}); cut or changed after "
            "it was saved: copy it again, or fit the tokenizers again"
        ) from None
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise ConfigError(
            f"{folder}: fingerprint {tokenizer.fingerprint}, but {SETTINGS} says {saved['fingerprint']}: its "
            "files were changed after they were saved"
        )
    return tokenizer


def saved_kind(folder: Path, modality: str) -> str:
    """The kind of the tokenizer saved in a folder."""
    return _read_settings(folder).get("kind", default_kind(modality))


def named_kind(modality: str, kind: str) -> dict[str, str]:
    """{"kind": kind} for a file; nothing for a modality's default kind, as in files older than kinds."""
    return {} if kind == default_kind(modality) else {"kind": kind}


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        saved = json.loads((folder / SETTINGS).read_text())
        return {**saved, "settings": dict(saved["settings"]), "fingerprint": saved["fingerprint"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: not a saved tokenizer ({type(error).__name__}: {error})") from None
