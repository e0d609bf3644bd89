"""Which differences are asked for."""

import pytest

from pretrain.comparison.contrasts import all_differences, difference_text, weights


def test_a_difference_is_weights() -> None:
    assert weights(("a", "b")) == {"a": 1, "b": -1}
    assert weights((("a", "b"), ("c", "d"))) == {"a": 1, "b": -1, "c": -1, "d": 1}
    assert weights((("a", "b"), ("b", "c"))) == {"a": 1, "b": -2, "c": 1}
    assert weights((("a", "b"), ("a", "b"))) == {}


@pytest.mark.parametrize(
    ("difference", "text"),
    [(("a", "b"), "a \u2212 b"), ((("a", "b"), ("c", "d")), "(a \u2212 b) \u2212 (c \u2212 d)")],
)
def test_a_difference_in_words(difference: tuple, text: str) -> None:
    assert difference_text(difference) == text


def test_every_arm_has_a_contrast_with_the_baseline() -> None:
    named = all_differences(("a", "b", "c"), "b", {"own": ("a", "c")})
    assert named == {"a": ("a", "b"), "c": ("c", "b"), "own": ("a", "c")}
