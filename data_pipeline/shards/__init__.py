"""Token shards: tars of documents, their index and their manifest."""
