"""The training data of a run in order. This module imports no torch."""

from data_pipeline.remote.location import RemoteSettings
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.stream import Stream
from pretrain.config import RunConfig


def training_stream(config: RunConfig, remote: RemoteSettings | None = None) -> Stream:
    """The training data in order. `remote`: how URLs are fetched; None: as a run fetches them.

    Raises ConfigError for shards that cannot be used.
    """
    remote = remote or config.data.remote_in_training
    return Stream(
        [(TokenSource.open(source.path, remote), source.weight) for source in config.data.train],
        seed=config.seed,
        context_tokens=config.model.context_tokens,
        sequences_per_step=config.sequences_per_step,
        max_too_long_frac=config.data.max_too_long_frac,
        weights_of=config.data.weights_of,
        temperature=config.data.temperature,
    )
