"""Token shards behind a URL: how their bytes are fetched, and the cache of a node that holds them."""
