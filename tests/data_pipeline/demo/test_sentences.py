import re
from random import Random

from data_pipeline.demo.scenes import COLUMN, INKS, ROW, Digit, Scene, draw_scene, split_scans
from data_pipeline.demo.sentences import caption, number_word, place, sentence

SCANS = split_scans(heldout=False)
SEEDS = range(1500)
WORDS = {number_word(value): value for value in range(37)}


def scene_of(seed: int) -> Scene:
    return draw_scene(Random(seed), SCANS)


def test_numbers_in_words() -> None:
    assert [number_word(value) for value in (0, 7, 13, 20, 36)] == [
        *("zero", "seven", "thirteen", "twenty", "thirty six"),
    ]


def in_words(text: str) -> str:
    return re.sub(r"\d+", lambda match: number_word(int(match[0])), text).lower().removesuffix(".")


def test_captions_name_every_digit_in_reading_order_with_its_ink() -> None:
    for seed in SEEDS:
        scene = scene_of(seed)
        text = in_words(caption(Random(seed), scene))
        digits = [(digit.ink, number_word(digit.value)) for digit in scene.digits]
        pairs = re.findall(rf"({'|'.join(INKS)}) (\w+)|(\w+) in ({'|'.join(INKS)})", text)
        found = [(ink or later, word or earlier) for ink, word, earlier, later in pairs]
        assert found == digits, text
        assert scene.paper in text


def test_what_is_spoken_is_what_is_written() -> None:
    for seed in SEEDS:
        written, spoken = sentence(Random(seed), scene_of(seed))
        assert in_words(written) == spoken
        assert not re.search(r"\d|<|>", spoken)


def test_what_is_said_of_sums_and_sizes_is_true() -> None:
    checked = 0
    number = "((?:twenty |thirty )?[a-z]+)"
    for seed in SEEDS:
        scene = scene_of(seed)
        _, spoken = sentence(Random(seed), scene)
        values = [digit.value for digit in scene.digits]
        for a, b, total in re.findall(rf"(\w+) plus (\w+) (?:is|makes|equals) {number}", spoken):
            checked += 1
            assert WORDS[a] + WORDS[b] == WORDS[total] == sum(values), spoken
        for total in re.findall(rf"(?:the sum is|together they make|they add up to) {number}", spoken):
            checked += 1
            assert WORDS[total] == sum(values), spoken
        for large, small in re.findall(r"(\w+) (?:is more than|beats) (\w+)", spoken):
            checked += 1
            assert large == "none" or WORDS[large] > WORDS[small], spoken
        for largest in re.findall(r"the largest is (\w+)|none is more than (\w+)", spoken):
            checked += 1
            assert WORDS["".join(largest)] == max(values), spoken
    assert checked > 200


def test_what_is_said_of_positions_is_true() -> None:
    checked = 0
    beside = {
        "left of": lambda a, b: a.left_px < b.left_px,
        "right of": lambda a, b: a.left_px > b.left_px,
        "above": lambda a, b: a.top_px < b.top_px,
        "below": lambda a, b: a.top_px > b.top_px,
        "higher than": lambda a, b: a.top_px < b.top_px,
        "lower than": lambda a, b: a.top_px > b.top_px,
    }
    for seed in SEEDS:
        scene = scene_of(seed)
        _, spoken = sentence(Random(seed), scene)
        for a, relation, b in re.findall(rf"(\w+) is (?:to the )?({'|'.join(beside)}) (\w+)", spoken):
            checked += 1
            named = {
                word: [d for d in scene.digits if word in (d.ink, number_word(d.value))] for word in (a, b)
            }
            assert any(beside[relation](x, y) for x in named[a] for y in named[b]), spoken
    assert checked > 100


def test_places_are_told_by_the_margins() -> None:
    def at(left: int, top: int) -> Scene:
        return Scene(ROW, "black", (Digit(3, 0, "red", 8, left, top),))

    assert [place(at(0, 0)), place(at(24, 12)), place(at(12, 12)), place(at(8, 24))] == [
        *("top left", "right", "middle", "bottom left"),
    ]


def test_phrasings_are_many() -> None:
    """Without numbers, inks, papers and sizes, captions of two digits in a column still differ."""
    scenes = [scene for scene in map(scene_of, SEEDS) if scene.layout == COLUMN and len(scene.digits) == 2]
    names = "|".join([*WORDS, *INKS, "black", "white", r"\d+", "small", "medium", "big"])
    shapes = {re.sub(names, "_", caption(Random(seed), scene).lower()) for seed, scene in enumerate(scenes)}
    assert len(shapes) > len(scenes) / 2 > 50
