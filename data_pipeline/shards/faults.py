"""What can be wrong with token shards: one class a fault, so that a program can tell them apart.

Each message names the file and says what to do.
"""

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import ShardError


class MissingShard(ShardError):
    """A shard that the manifest lists is not there."""


class TruncatedShard(ShardError):
    """A shard is shorter (or longer) than the manifest says, or ends inside a document."""


class WrongChecksum(ShardError):
    """Bytes differ from those that were written: of a shard, or of too many documents while reading."""


class BadDocument(ShardError):
    """A document that no vocabulary span rule allows: an id out of range, an image without its end."""


class ChangedIndex(ConfigError):
    """The index is damaged, or is not the one that a saved stream state was made with."""


class ForeignTokenizer(ConfigError):
    """Sources that are mixed were not tokenized with the same tokenizers and vocabulary."""


class SpanTooLong(ConfigError):
    """Too many documents hold an image or utterance that is longer than the context."""
