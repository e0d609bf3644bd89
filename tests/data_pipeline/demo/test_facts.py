from random import Random

import pytest

from data_pipeline.demo.facts import Match, caption_digits, match_digits, said_digits
from data_pipeline.demo.scenes import draw_scene, split_scans
from data_pipeline.demo.sentences import caption, number_word, sentence

SCANS = split_scans(heldout=False)


def test_the_digits_of_every_caption_are_found_again() -> None:
    for seed in range(1000):
        scene = draw_scene(Random(seed), SCANS)
        text = caption(Random(seed), scene)
        written, _ = sentence(Random(seed), scene)
        digits = tuple(digit.value for digit in scene.digits)
        assert caption_digits(text) == caption_digits(f"{text}\n{written}") == digits, text


def test_the_words_of_every_spoken_sentence_are_those_of_the_written_one() -> None:
    words = [number_word(value) for value in range(10)]
    for seed in range(1000):
        written, spoken = sentence(Random(seed), draw_scene(Random(seed), SCANS))
        heard = {word for word in spoken.replace(",", " ").replace(";", " ").split() if word in words}
        assert said_digits(f"a caption of a red 3\n{written}") == tuple(sorted(map(words.index, heard)))


@pytest.mark.parametrize(
    ("text", "named", "said"),
    [
        ("3 small digits: red 1, blue 1", (1, 1), (1, 3)),
        ("a red nine, one above the other", (9,), (1, 9)),
        ("7 in pink then two in blue", (7, 2), (2, 7)),
        ("a red 12 and a green 40.", (), ()),
        ("12345678901234567890 in red", (), ()),
        ("", (), ()),
    ],
)
def test_other_numbers_name_no_digit(text: str, named: tuple[int, ...], said: tuple[int, ...]) -> None:
    assert caption_digits(text) == named and said_digits(text) == said


def test_digits_match_in_order_or_in_number() -> None:
    assert match_digits((3, 7), (3, 7)) == Match(True, 2, 2)
    assert match_digits((7, 3), (3, 7)) == Match(False, 2, 2)
    assert match_digits((3, 3, 3), (3, 7)) == Match(False, 1, 3)
    assert match_digits((), (3,)) == Match(False, 0, 1)
