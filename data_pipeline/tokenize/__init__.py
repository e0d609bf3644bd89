"""From raw files to token shards."""
