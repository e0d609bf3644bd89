import pytest

from data_pipeline.demo.library_text import MAX_CHARACTERS, MIN_CHARACTERS, Passage, library_passages

Passages = tuple[Passage, ...]


@pytest.fixture(scope="module")
def passages() -> Passages:
    return library_passages()


def test_there_is_enough_of_it_and_in_pieces_that_fit(passages: Passages) -> None:
    assert len(passages) > 2000
    assert all(MIN_CHARACTERS <= len(passage.text) <= 2 * MAX_CHARACTERS for passage in passages)
    assert any("class" in passage.text for passage in passages)


def test_no_paragraph_occurs_twice_so_none_is_in_both_splits(passages: Passages) -> None:
    paragraphs = [paragraph for passage in passages for paragraph in passage.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_a_module_is_held_out_whole(passages: Passages) -> None:
    heldout = {passage.origin for passage in passages if passage.heldout}
    assert not heldout & {passage.origin for passage in passages if not passage.heldout}
    share = sum(passage.heldout for passage in passages) / len(passages)
    assert 0.03 < share < 0.2
