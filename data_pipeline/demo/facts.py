"""Pure functions read the digits that texts of the demo corpus state: the inverse of `sentences`."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from data_pipeline.demo.scenes import INKS
from data_pipeline.demo.sentences import number_word

_DIGITS = {number_word(value): value for value in range(10)}
_INK, _NUMBER = "|".join(INKS), "|".join([*_DIGITS, "[0-9]"])
_NAMED = re.compile(rf"\b(?:{_INK}) ({_NUMBER})\b|\b({_NUMBER}) in (?:{_INK})\b")


class Match(NamedTuple):
    """The agreement of stated digits with the digits that should be stated."""

    exact: bool
    """Whether they are the same digits in the same order."""
    shared: int
    """Digits that both have, in any order; a digit that is stated twice counts twice."""
    larger: int
    """The larger of the two numbers of digits: `shared` is at most as large."""


def match_digits(stated: Iterable[int], wanted: Iterable[int]) -> Match:
    """The agreement of two series of digits."""
    ours, theirs = tuple(stated), tuple(wanted)
    shared = (Counter(ours) & Counter(theirs)).total()
    return Match(ours == theirs, shared, max(len(ours), len(theirs)))


def caption_digits(text: str) -> tuple[int, ...]:
    """The digits that a caption names with their inks, in its order: "A red 3, then 7 in blue" has 3 and 7.

    Numbers without an ink, as in "two small digits" or "one above the other", name no digit. Only the first
    line is read: a sentence may follow the caption.
    """
    first_line = text.strip().partition("\n")[0].lower()
    words = (before or behind for before, behind in _NAMED.findall(first_line))
    return tuple(_DIGITS[word] if word in _DIGITS else int(word) for word in words)


def said_digits(text: str) -> tuple[int, ...]:
    """The digits 0 to 9 whose words are heard when the last line of a text is spoken, in ascending order,
    each once: "3 plus 20 is 23" has "three" alone."""
    last_line = text.strip().rpartition("\n")[2].lower()
    spoken = re.sub(r"\d+", lambda match: _in_words(match[0]), last_line)
    return tuple(sorted({_DIGITS[word] for word in re.findall("[a-z]+", spoken) if word in _DIGITS}))


def _in_words(numeral: str) -> str:
    """A numeral in words; empty where it is larger than any number of the corpus."""
    value = int(numeral) if len(numeral) < 3 else 40
    return number_word(value) if value < 40 else ""
