"""Generation: decoding on a cache, sampling inside the grammar of a vocabulary, and the files of samples."""
