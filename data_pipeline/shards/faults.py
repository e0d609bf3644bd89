"""Faults of token shards: one exception class per fault, so that a program can tell them apart.

Each message names the file and says what to do.
"""

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import ShardError


class MissingShard(ShardError):
    """A shard that the manifest lists is not there."""


class TruncatedShard(ShardError):
    """A shard is shorter (or longer) than the manifest says, or ends inside a document."""


class WrongChecksum(ShardError):
    """A shard, or more documents than a run allows, hold other bytes than those that were indexed."""


class BadDocument(ShardError):
    """A document that no tokenizer writes: an id out of range, an image without its closing delimiter."""


class ChangedIndex(ConfigError):
    """The index is damaged, or is not the one that a saved stream state was made with."""


class ForeignTokenizer(ConfigError):
    """Sources of one mixture were not tokenized with the same tokenizers and vocabulary."""


class SpanTooLong(ConfigError):
    """Too many documents hold an image, an utterance or another span that is longer than the context."""
