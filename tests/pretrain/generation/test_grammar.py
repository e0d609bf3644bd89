import numpy as np
import pytest

from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vocabulary import BOI, BOS, BOS_SPEECH, EOI, EOS, EOS_SPEECH, PAD, TEXT, Vocabulary
from pretrain.generation.grammar import FREE, Grammar, Place

VOCABULARY = Vocabulary(sizes={"text": 12, "image": 5, "speech": 4, "video": 6})
GRID = 4
VIDEO = VOCABULARY.start("video")


def grammar(goal: str = FREE) -> Grammar:
    return Grammar(VOCABULARY, {"image": GRID}, goal)


def ids_allowed(place: Place, room: int = 100, goal: str = FREE) -> set[int]:
    return set(np.flatnonzero(grammar(goal).allowed(place, room)).tolist())


def test_text_never_holds_a_code_or_a_stray_delimiter() -> None:
    text, openings = set(range(7, 12)), {BOI, BOS_SPEECH, VIDEO}
    assert ids_allowed(Place()) == text | openings | {EOS}
    assert ids_allowed(Place(), goal=TEXT) == text | {EOS}
    assert not {PAD, BOS, EOI, EOS_SPEECH, VIDEO + 1} & ids_allowed(Place())


def test_an_image_has_exactly_its_grid_and_speech_any_number_of_codes() -> None:
    image, speech = set(range(12, 17)), set(range(17, 21))
    for codes in range(GRID):
        assert ids_allowed(Place("image", codes)) == image
    assert ids_allowed(Place("image", GRID)) == {EOI}
    assert ids_allowed(Place("speech", 0)) == speech
    assert ids_allowed(Place("speech", 9)) == speech | {EOS_SPEECH}
    assert ids_allowed(Place("speech", 9), room=1) == {EOS_SPEECH}
    assert ids_allowed(Place("video", 1)) == {VIDEO + 1, *range(VIDEO + 2, VIDEO + 6)}


def test_no_span_is_opened_that_cannot_be_closed() -> None:
    assert BOI in ids_allowed(Place(), room=GRID + 2) and BOI not in ids_allowed(Place(), room=GRID + 1)
    assert BOS_SPEECH in ids_allowed(Place(), room=3) and BOS_SPEECH not in ids_allowed(Place(), room=2)
    assert grammar("image").least_room() == GRID + 2 and grammar("speech").least_room() == 3


@pytest.mark.parametrize(("goal", "opening"), [("image", BOI), ("speech", BOS_SPEECH), ("video", VIDEO)])
def test_a_goal_is_one_span(goal: str, opening: int) -> None:
    of = grammar(goal)
    assert ids_allowed(Place(), goal=goal) == {opening}
    place = of.after(Place(), opening)
    code = VOCABULARY.first_code(goal)
    for _ in range(GRID):
        place = of.after(place, code)
    assert place == Place(goal, GRID)
    assert of.after(place, VOCABULARY.delimiters(goal)[1]) == Place(ended=True)


def test_random_walks_are_documents_that_the_index_takes() -> None:
    """With any budget of ids, what is written is whole: `read_spans` refuses all else."""
    rng, of = np.random.default_rng(0), grammar()
    seen = set()
    for _ in range(300):
        place, room, ids = Place(), int(rng.integers(1, 40)), [BOS]
        while room and not place.ended:
            ids.append(int(rng.choice(np.flatnonzero(of.allowed(place, room)))))
            place, room = of.after(place, ids[-1]), room - 1
        document = np.array(ids if ids[-1] == EOS else [*ids, EOS])
        spans = read_spans(document, VOCABULARY)
        assert all(span.end - span.start == GRID + 2 for span in spans if span.modality == "image")
        seen |= {span.modality for span in spans}
    assert seen == set(VOCABULARY.modalities)
