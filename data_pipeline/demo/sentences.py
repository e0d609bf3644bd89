"""Sentences about a scene: a caption that describes the picture, and a short sentence that is spoken."""

import re
from collections.abc import Sequence
from random import Random

from data_pipeline.demo.scenes import (
    ALONE,
    COLUMN,
    FALLING,
    GRID_PX,
    PICTURE_PX,
    RISING,
    ROW,
    SIZE_NAMES,
    SQUARE,
    Digit,
    Scene,
)

_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven"),
    *("twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = {20: "twenty", 30: "thirty"}

_ORDER = {
    ROW: ("from left to right", "reading left to right", "in a row", "side by side", "left to right"),
    COLUMN: ("from top to bottom", "going down", "in a column", "one above the other", "stacked"),
    RISING: ("climbing to the right", "on a rising diagonal", "going up like stairs"),
    FALLING: ("falling to the right", "on a falling diagonal", "going down like stairs"),
    SQUARE: ("in a square", "two by two", "in two rows of two", "row by row"),
}
_OPENERS = (
    "",
    "",
    "",
    "a picture of ",
    "this shows ",
    "here is ",
    "we see ",
    "there is ",
    "look: ",
    "drawn by hand: ",
)
_PAPER = ("on {}", "on a {} background", "on {} paper", "against {}", "with a {} background")
_NEXT_TO = {
    ROW: (
        ("{a} is to the left of {b}", "{a} is left of {b}", "{a} comes before {b}"),
        ("{b} is to the right of {a}", "{b} is right of {a}", "{b} comes after {a}"),
    ),
    COLUMN: (("{a} is above {b}", "{a} is over {b}"), ("{b} is below {a}", "{b} is under {a}")),
    FALLING: (
        ("{a} is higher than {b}", "{a} is above {b}", "{a} is left of {b}"),
        ("{b} is lower than {a}", "{b} is below {a}", "{b} is right of {a}"),
    ),
    RISING: (
        ("{a} is lower than {b}", "{a} is below {b}", "{a} is left of {b}"),
        ("{b} is higher than {a}", "{b} is above {a}", "{b} is right of {a}"),
    ),
}


def number_word(value: int) -> str:
    """0 .. 39 in words."""
    if value < len(_WORDS):
        return _WORDS[value]
    tens, ones = value - value % 10, value % 10
    return _TENS[tens] + (f" {_WORDS[ones]}" if ones else "")


def _with_numbers(text: str, *, as_words: bool) -> str:
    """Fill in numbers, which the phrases below carry as <7>, as words or as numerals."""
    return re.sub(r"<(\d+)>", lambda match: number_word(int(match[1])) if as_words else match[1], text)


def caption(random: Random, scene: Scene) -> str:
    """A caption of the picture: digits in reading order with their inks, layout, size, position and paper."""
    style = random.randrange(3)
    listed = _listed(random, [_named(digit, style) for digit in scene.digits])
    details = []
    if scene.layout == ALONE:
        details.append(_place_named(random, scene))
    else:
        details.append(random.choice(_ORDER[scene.layout]))
        if random.random() < 0.4:
            details.append(_place_named(random, scene))
    details.append(random.choice(_PAPER).format(scene.paper))
    if random.random() < 0.25:
        random.shuffle(details)
    size = SIZE_NAMES[scene.digits[0].size_px]
    opener = random.choice(_OPENERS)
    many = len(scene.digits) > 1
    if random.random() < 0.5:
        subject = f"{size} digits: {listed}" if many else f"a {size} digit: {listed}"
        if many and random.random() < 0.5:
            subject = f"<{len(scene.digits)}> {subject}"
    else:
        subject = listed
        details.insert(random.randrange(len(details) + 1), f"all {size}" if many else size)
    joint = random.choice((" ", ", "))
    if opener == "there is " and many:
        opener = "there are "
    return _styled(random, opener + subject + ", " + joint.join(details))


def _named(digit: Digit, style: int) -> str:
    return (
        f"{digit.ink} <{digit.value}>",
        f"{_article(digit.ink)} {digit.ink} <{digit.value}>",
        f"<{digit.value}> in {digit.ink}",
    )[style]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _listed(random: Random, names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    comma, last = random.choice(((", ", " and "), (", ", ", "), (", ", " then "), (", then ", ", then ")))
    return comma.join(names[:-1]) + last + names[-1]


def _place_named(random: Random, scene: Scene) -> str:
    return random.choice(("at the {}", "in the {}", "{}")).format(place(scene))


def place(scene: Scene) -> str:
    """The position of all digits together, "top left", "middle" ..., from the margins around them."""
    left = min(digit.left_px for digit in scene.digits)
    right = PICTURE_PX - max(digit.left_px + digit.size_px for digit in scene.digits)
    top = min(digit.top_px for digit in scene.digits)
    bottom = PICTURE_PX - max(digit.top_px + digit.size_px for digit in scene.digits)
    across = "" if abs(left - right) <= GRID_PX else "left" if left < right else "right"
    down = "" if abs(top - bottom) <= GRID_PX else "top" if top < bottom else "bottom"
    return f"{down} {across}".strip() or "middle"


def _styled(random: Random, text: str) -> str:
    text = _with_numbers(text, as_words=random.random() < 0.4)
    return text[0].upper() + text[1:] + "." if random.random() < 0.5 else text


def sentence(random: Random, scene: Scene) -> tuple[str, str]:
    """(sentence as written, as spoken) with one or two facts: reading order, inks, a position, a sum ..."""
    makers = [_order_said, _ink_said, _place_said, _paper_said]
    if len(scene.digits) > 1:
        makers += [_order_said, _sum_said, _sum_said, _comparison_said, _comparison_said]
        if scene.layout in _NEXT_TO:
            makers += [_position_said, _position_said]
    first, second = random.sample(makers, 2)
    said = first(random, scene)
    if first is not second and random.random() < 0.6:
        said += random.choice((", ", ", and ", "; ")) + second(random, scene)
    return _styled(random, said), _with_numbers(said, as_words=True)


def _order_said(random: Random, scene: Scene) -> str:
    digits = scene.digits
    if len(digits) > 2 or random.random() < 0.3:
        plain = [f"<{digit.value}>" for digit in digits]
        opening = "it reads " if random.random() < 0.3 else ""
        return opening + ", ".join(plain)
    joint = random.choice((" and ", " then ", ", "))
    return joint.join(_named(digit, random.choice((0, 0, 1))) for digit in digits)


def _ink_said(random: Random, scene: Scene) -> str:
    inks = {digit.ink for digit in scene.digits}
    many = len(scene.digits) > 1
    if len(inks) == 1 and many:
        return f"they are all {scene.digits[0].ink}"
    digit = random.choice(scene.digits)
    same_value = [other for other in scene.digits if other.value == digit.value]
    if len(same_value) == 1:
        return random.choice((f"the <{digit.value}> is {digit.ink}", f"{digit.ink} is the <{digit.value}>"))
    return f"one <{digit.value}> is {digit.ink}"


def _sum_said(random: Random, scene: Scene) -> str:
    values = [digit.value for digit in scene.digits]
    total = sum(values)
    if len(values) > 2 or random.random() < 0.3:
        return random.choice(("the sum is <{}>", "together they make <{}>", "they add up to <{}>")).format(
            total
        )
    joint = random.choice(("is", "makes", "equals"))
    return f"<{values[0]}> plus <{values[1]}> {joint} <{total}>"


def _comparison_said(random: Random, scene: Scene) -> str:
    values = [digit.value for digit in scene.digits]
    low, high = min(values), max(values)
    if low == high:
        return random.choice(("they are all the same", f"nothing but <{low}>", f"all of them are <{low}>"))
    if len(values) == 2 and random.random() < 0.6:
        return random.choice(
            (f"<{high}> is more than <{low}>", f"<{low}> is less than <{high}>", f"<{high}> beats <{low}>")
        )
    return random.choice(
        (f"the largest is <{high}>", f"the smallest is <{low}>", f"none is more than <{high}>")
    )


def _position_said(random: Random, scene: Scene) -> str:
    first = random.randrange(len(scene.digits) - 1)
    a, b = scene.digits[first], scene.digits[first + 1]
    template = random.choice(random.choice(_NEXT_TO[scene.layout]))
    if a.ink != b.ink and (a.value == b.value or random.random() < 0.3):
        return template.format(a=a.ink, b=b.ink)
    if a.value == b.value:
        return f"<{a.value}> and again <{b.value}>"
    return template.format(a=f"<{a.value}>", b=f"<{b.value}>")


def _place_said(random: Random, scene: Scene) -> str:
    they = "they are" if len(scene.digits) > 1 else random.choice(("it is", "it stands"))
    return f"{they} at the {place(scene)}"


def _paper_said(random: Random, scene: Scene) -> str:
    return random.choice(("the paper is {}", "drawn on {}", "all around is {}")).format(scene.paper)
