"""TokenizeConfig: what data.toml holds.

fit_documents = 6000                 keys of TokenizeSettings
[image]                              a modality of the data, its tokenizer and that one's settings
kind = "patch_kmeans"                may be left out: registry.KINDS says the default
num_codes = 512                      keys of the config model in the tokenizer's file
[limits]                             keys of Limits: what a raw sample may be
picture_mpx = 20
[source]                             keys of SourceSettings: where the parts of a document are
parts = [{image = "jpg"}, {text = "txt"}]
[video]                              any other modality needs a kind: the module of its tokenizer
kind = "my_package.video_tokenizer"
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt

from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.toml_config import ConfigError, apply_override, load_toml, validate
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.layout import RAW, SourceSettings
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.registry import KINDS, default_kind, load_kind, named_kind
from data_pipeline.tokenize.tokenizer import TokenizerConfig

LIMITS, SOURCE = "limits", "source"
"""The tables of a data.toml that are no modality's."""
_MODALITY = re.compile(r"[a-z][a-z0-9_]*")


class TokenizeSettings(BaseModel):
    """How tokenizers are fitted, and how raw shards become token shards."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tokenizers_from: str | None = None
    """Folder of tokenizers to use (OUT/tokenizers of an earlier `motley tokenize`); none are fitted then."""
    fit_split: str = "train"
    """Sub-folder of SRC that tokenizers are fitted on; meaningless where SRC itself holds the shards."""
    fit_documents: PositiveInt = 6000
    """Tokenizers are fitted on at most so many documents, from shards spread over the split."""
    seed: NonNegativeInt = 1
    raw_shards_per_shard: PositiveInt = 1
    """Raw shards that go into one token shard. Tokens are small: join many small raw shards."""
    max_bad_frac: float = Field(0.001, ge=0, le=1)
    """Share of documents that may be skipped as unusable before it is an error."""


@dataclass(frozen=True)
class TokenizerTable:
    """The table of a modality names the kind of its tokenizer and holds that tokenizer's settings."""

    kind: str
    config: TokenizerConfig


@dataclass(frozen=True)
class TokenizeConfig:
    """A data.toml. Data holds only modalities that have a table, in the order of `tables`: text first."""

    tables: Mapping[str, TokenizerTable]
    settings: TokenizeSettings
    limits: Limits
    source: SourceSettings = RAW

    def values(self, *, exclude: Iterable[str] = ()) -> dict[str, Any]:
        """All values as JSON, without the settings `exclude` and defaults of kinds, limits and source."""
        tables = {
            name: {**named_kind(name, table.kind), **table.config.model_dump(mode="json")}
            for name, table in self.tables.items()
        }
        limits = self.limits.model_dump(mode="json", exclude_defaults=True)
        source = self.source.model_dump(mode="json", exclude_defaults=True)
        return {
            **tables,
            **self.settings.model_dump(mode="json", exclude=set(exclude)),
            **({LIMITS: limits} if limits else {}),
            **({SOURCE: source} if source else {}),
        }


def load_tokenize_config(path: str | Path, overrides: Sequence[str] = ()) -> TokenizeConfig:
    """Read a data.toml, apply overrides such as "image.num_codes=64" and check it. Raises ConfigError."""
    values = load_toml(path)
    for override in overrides:
        apply_override(values, override)
    return tokenize_config(values, str(path))


def tokenize_config(values: Mapping[str, Any], source: str) -> TokenizeConfig:
    """The config of values such as a TOML file holds. Raises one ConfigError that lists all mistakes."""
    tables: dict[str, TokenizerTable] = {}
    mistakes: list[str] = []
    named = (
        name for name, value in values.items() if isinstance(value, dict) and name not in (LIMITS, SOURCE)
    )
    for name in modality_order(named):
        try:
            tables[name] = _table(name, values[name], source)
        except ConfigError as error:
            mistakes.append(str(error))
    try:
        plain = {name: value for name, value in values.items() if not isinstance(value, dict)}
        source_given = plain.pop(SOURCE, values.get(SOURCE, {}))
        limits_given = plain.pop(LIMITS, values.get(LIMITS, {}))
        settings = validate(TokenizeSettings, plain, source)
        limits = validate(Limits, limits_given, source, table=LIMITS)
        layout = validate(SourceSettings, source_given, source, table=SOURCE)
    except ConfigError as error:
        raise ConfigError("\n".join([*mistakes, str(error)])) from None
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    if settings.tokenizers_from is None and TEXT not in tables:
        raise ConfigError(
            f"{source}: the table [{TEXT}] is needed (it may be empty): its vocabulary holds the special "
            "tokens"
        )
    if settings.tokenizers_from is not None and tables:
        raise ConfigError(
            f"{source}: tokenizers_from brings its own settings; remove the tables {list(tables)}"
        )
    return TokenizeConfig(tables, settings, limits, layout)


def modality_order(names: Iterable[str]) -> list[str]:
    """Modalities in the order of the id space: those of the registry in its order, then others by name."""
    known = list(KINDS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def _table(name: str, values: Mapping[str, Any], source: str) -> TokenizerTable:
    kind = values.get("kind", default_kind(name))
    if kind is None:
        legal = [*KINDS, LIMITS, SOURCE, *TokenizeSettings.model_fields]
        hint = did_you_mean(name, legal, otherwise=".")
        raise ConfigError(
            f"{source}: {name}: unknown key{hint} Legal here: {', '.join(sorted(legal))}, and the table of "
            "any other modality, whose kind is the dotted path of a module that defines TOKENIZER"
        )
    if not _MODALITY.fullmatch(name):
        raise ConfigError(
            f"{source}: {name}: a modality is named with small letters, digits and _, such as depth_map"
        )
    definition = load_kind(name, kind, f"{source}: {name}.kind")
    settings = {key: value for key, value in values.items() if key != "kind"}
    return TokenizerTable(kind, validate(definition.config, settings, source, table=name))
