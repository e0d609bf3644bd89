"""From token shards to packed micro-batches: the order of training data."""
