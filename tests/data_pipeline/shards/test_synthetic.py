from pathlib import Path

import numpy as np

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.synthetic import random_document, random_documents, write_token_folder
from data_pipeline.shards.tar import read_manifest
from data_pipeline.shards.vocabulary import SPECIAL_TOKENS, Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 300, "image": 64, "speech": 32})


def test_a_document_has_the_parts_asked_for() -> None:
    ids = random_document(np.random.default_rng(0), VOCABULARY, [("text", 4), ("image", 9), ("speech", 3)])
    assert read_spans(ids, VOCABULARY) == (("text", 1, 5), ("image", 5, 16), ("speech", 16, 21))
    assert ids.dtype == np.uint16 and ids[1:5].min() >= len(SPECIAL_TOKENS)


def test_documents_are_the_same_for_a_seed_and_of_all_kinds() -> None:
    one, same, other = (
        list(random_documents(VOCABULARY, 200, seed, median_text_tokens=50, image_tokens=16))
        for seed in (1, 1, 2)
    )
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    kinds = [{part.modality for part in read_spans(ids, VOCABULARY)} for ids in one]
    assert {"text"} in kinds and {"text", "image", "speech"} in kinds
    assert 25 < np.median([len(ids) for ids in one]) < 200
    text_only = Vocabulary(sizes={"text": 300})
    assert all(
        {part.modality for part in read_spans(ids, text_only)} == {"text"}
        for ids in random_documents(text_only, 20, 1, median_text_tokens=5, image_tokens=5)
    )


def test_a_folder_is_what_its_manifest_says(tmp_path: Path) -> None:
    documents = list(random_documents(VOCABULARY, 25, 0, median_text_tokens=5, image_tokens=4))
    folder = write_token_folder(
        tmp_path / "x", documents, VOCABULARY, documents_per_shard=10, fingerprint="f"
    )
    manifest, source = read_manifest(folder), TokenSource.open(folder)
    assert manifest["num_documents"] == source.num_documents == 25
    assert [entry["documents"] for entry in manifest["shards"]] == [10, 10, 5]
    counts = sum(np.bincount(VOCABULARY.modality_of(ids), minlength=3) for ids in documents)
    assert list(manifest["tokens"].values()) == list(counts)
    assert source.fingerprints == {"text": "f-text", "image": "f-image", "speech": "f-speech"}
