import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards.spans import SpanError, find_spans, read_spans
from data_pipeline.shards.synthetic import random_document
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH, Vocabulary

VOCABULARY = Vocabulary(sizes={"text": 40, "image": 8, "speech": 6})
PARTS = st.lists(st.tuples(st.sampled_from(VOCABULARY.modalities), st.integers(1, 9)), min_size=1, max_size=7)


def test_the_parts_of_a_document_with_all_modalities() -> None:
    ids = np.array([BOS, 9, 10, BOI, 41, 47, EOI, BOS_SPEECH, 50, EOS_SPEECH, 11, EOS])
    assert read_spans(ids, VOCABULARY) == (
        ("text", 1, 3),
        ("image", 3, 7),
        ("speech", 7, 10),
        ("text", 10, 11),
    )


@given(parts=PARTS, seed=st.integers(0, 1000))
def test_parts_cover_the_document_between_bos_and_eos_in_the_order_they_were_written(
    parts: list[tuple[str, int]], seed: int
) -> None:
    ids = random_document(np.random.default_rng(seed), VOCABULARY, parts)
    found = read_spans(ids, VOCABULARY)
    expected: list[list] = []  # texts in a row have no border between them
    for modality, tokens in parts:
        if modality == "text" and expected and expected[-1][0] == "text":
            expected[-1][1] += tokens
        else:
            expected.append([modality, tokens if modality == "text" else tokens + 2])
    assert [[part.modality, part.end - part.start] for part in found] == expected
    assert [1, *(part.end for part in found)] == [*(part.start for part in found), len(ids) - 1]


@given(documents=st.lists(PARTS, max_size=5), seed=st.integers(0, 1000))
def test_spans_of_documents_in_a_row_are_those_of_each(
    documents: list[list[tuple[str, int]]], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    each = [random_document(rng, VOCABULARY, parts) for parts in documents]
    together = find_spans(np.concatenate([np.zeros(0, np.uint16), *each]), VOCABULARY)
    expected, before = [], 0
    for ids in each:
        for part in read_spans(ids, VOCABULARY):
            if part.modality != "text":
                modality = VOCABULARY.modalities.index(part.modality)
                expected.append((before + part.start, before + part.end, modality))
        before += len(ids)
    assert [tuple(map(int, row)) for row in zip(*together, strict=True)] == expected


@pytest.mark.parametrize(
    ("ids", "position", "message"),
    [
        ([BOS, 54, EOS], 1, "id 54 at position 1 is not in the vocabulary of 54"),
        ([BOS, BOI, 41, EOS], 1, "do not pair up at position 1"),
        ([BOS, BOI, 41, EOS_SPEECH, EOS], 1, "do not pair up"),
        ([BOS, EOI, 9, BOI, EOS], 1, "do not pair up"),
        ([BOS, BOI, BOI, EOI, EOI, EOS], 1, "do not pair up"),
        ([BOS, 9, 41, EOS], 2, "an id of image at position 2 stands where another modality belongs"),
        ([BOS, BOI, 41, 9, EOI, EOS], 3, "an id of text at position 3"),
        ([BOS, BOI, 41, 49, EOI, EOS], 3, "an id of speech at position 3"),
        ([9, 10, EOS], 0, "starts with <bos> and ends with <eos>"),
        ([BOS, 9], 0, "starts with <bos> and ends with <eos>"),
    ],
)
def test_what_is_no_document_is_named_with_its_position(ids: list[int], position: int, message: str) -> None:
    with pytest.raises(SpanError, match=message) as caught:
        read_spans(np.array(ids, np.uint16), VOCABULARY)
    assert caught.value.position == position


def test_an_empty_image_is_an_image() -> None:
    assert read_spans(np.array([BOS, BOI, EOI, EOS]), VOCABULARY) == (("image", 1, 3),)
