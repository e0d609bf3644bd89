from pathlib import Path

import numpy as np

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.synthetic import random_document, write_token_folder
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.at_start import describe, warnings
from data_pipeline.stream.stream import Stream

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64})


def write(folder: Path, image_tokens: list[int]) -> TokenSource:
    """A source of documents of 5 ids of text and an image each, 40 a shard."""
    rng = np.random.default_rng(0)
    documents = [random_document(rng, VOCABULARY, [("text", 5), ("image", n)]) for n in image_tokens]
    return TokenSource.open(write_token_folder(folder, documents, VOCABULARY, documents_per_shard=40))


def stream_of(*sources: TokenSource) -> Stream:
    pairs = [(source, 1.0) for source in sources]
    return Stream(pairs, seed=1, context_tokens=64, sequences_per_step=6, max_too_long_frac=0.05)


def test_documents_with_a_span_longer_than_the_context_are_counted_and_named(tmp_path: Path) -> None:
    source = write(tmp_path, [63 if i in (1, 81) else 9 for i in range(90)])
    lines = describe(stream_of(source))
    assert "90 documents" in lines[0] and "share 1" in lines[0]
    assert "2 documents left out" in lines[1] and "tokens-00002.tar/000000081" in lines[1]


def test_more_passes_than_wanted_and_shared_shards_are_warned_of(tmp_path: Path) -> None:
    source = write(tmp_path / "0", [9] * 90)
    stream = stream_of(source)
    (passes,) = stream.expected_epochs(1000)
    assert passes > 4 and warnings(stream, 1000, max_epochs=passes) == []
    (line,) = warnings(stream, 1000, max_epochs=4.0)
    assert line.startswith(f"warning: {source.folder}: the run passes over its 90 documents {passes:.1f} ")
    assert "more than data.max_epochs = 4," in line
    longer = write(tmp_path / "1", [9] * 130)  # the documents of the first source, and more
    (line,) = warnings(stream_of(source, longer), 1, max_epochs=4.0)
    assert f"{source.folder} and {longer.folder} share 2 shards" in line
