"""The manifest of a run's data, in a folder or behind a URL. This module imports no torch."""

from pathlib import Path
from typing import Any

from data_pipeline.remote.location import shown
from data_pipeline.shards.tar import read_manifest, typed_location
from pretrain.config import RunConfig


def data_manifest(config: RunConfig) -> dict[str, Any]:
    """The manifest of the first source of a run, whose ids are those of all its sources.

    Raises ShardError without one, and ConfigError for a URL that is not to be opened here.
    """
    location = typed_location(config.data.train[0].path)
    if isinstance(location, Path):
        return read_manifest(location)
    from data_pipeline.remote.source import remote_manifest  # it imports what reads shards

    return remote_manifest(location, config.data.remote)


def data_name(config: RunConfig) -> str:
    """The folder or URL of the first source of a run, for people."""
    location = typed_location(config.data.train[0].path)
    return str(location) if isinstance(location, Path) else shown(location)
