from data_pipeline.demo.library_text import MAX_CHARACTERS, MIN_CHARACTERS, library_passages

PASSAGES = library_passages()


def test_there_is_enough_of_it_and_in_pieces_that_fit() -> None:
    assert len(PASSAGES) > 2000
    assert all(MIN_CHARACTERS <= len(passage.text) <= 2 * MAX_CHARACTERS for passage in PASSAGES)
    assert any("class" in passage.text for passage in PASSAGES)


def test_no_paragraph_occurs_twice_so_none_is_in_both_splits() -> None:
    paragraphs = [paragraph for passage in PASSAGES for paragraph in passage.text.split("\n\n")]
    assert len(paragraphs) == len(set(paragraphs))


def test_a_module_is_held_out_whole() -> None:
    heldout = {passage.origin for passage in PASSAGES if passage.heldout}
    assert not heldout & {passage.origin for passage in PASSAGES if not passage.heldout}
    share = sum(passage.heldout for passage in PASSAGES) / len(PASSAGES)
    assert 0.03 < share < 0.2
