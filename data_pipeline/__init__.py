"""Raw files -> token shards -> packed micro-batches. Knows ranks as two integers."""
