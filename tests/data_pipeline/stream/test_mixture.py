import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.stream.mixture import (
    BLOCK_DOCUMENTS,
    MIN_BLOCK_DOCUMENTS,
    block_documents,
    drawn_before,
    shares,
)

WEIGHTS = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=5)
SIZES = st.lists(st.integers(1, 10**9), min_size=5, max_size=5)


def test_a_weight_is_what_its_digits_say() -> None:
    assert shares([0.35, 0.65]) == (Fraction(7, 20), Fraction(13, 20))
    assert shares([1.0, 2.0]) == (Fraction(1, 3), Fraction(2, 3))
    assert shares([5]) == (Fraction(1),)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_a_weight_is_above_zero(weight: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        shares([1.0, weight])


@pytest.mark.parametrize(
    "weights", [(0.35, 0.65), (0.5, 0.3, 0.2), (1, 2), (0.9, 0.05, 0.05), (0.999, 0.001)]
)
def test_every_block_holds_the_exact_mixture(weights: tuple[float, ...]) -> None:
    exact = shares(weights)
    size = block_documents([10**7] * len(weights), exact)
    for block in range(50):
        before, after = drawn_before(block, size, exact), drawn_before(block + 1, size, exact)
        assert [b - a for a, b in zip(before, after, strict=True)] == [share * size for share in exact]


@given(weights=WEIGHTS, sizes=SIZES, block=st.integers(0, 10**6))
def test_no_source_is_ever_a_document_away_from_its_share(
    weights: list[float], sizes: list[int], block: int
) -> None:
    exact = shares(weights)
    size = block_documents(sizes[: len(weights)], exact)
    assert 0 < size <= max(BLOCK_DOCUMENTS, MIN_BLOCK_DOCUMENTS)
    drawn = drawn_before(block, size, exact)
    for count, share in zip(drawn, exact, strict=True):
        assert 0 <= block * size * share - count < 1
    assert all(a <= b for a, b in zip(drawn, drawn_before(block + 1, size, exact), strict=True))


@given(documents=st.integers(1, 10**9))
def test_an_epoch_of_one_source_is_a_whole_number_of_blocks(documents: int) -> None:
    size = block_documents([documents], (Fraction(1),))
    assert size <= BLOCK_DOCUMENTS
    blocks = documents / size
    assert blocks.denominator == 1
    assert drawn_before(int(blocks) * 3, size, (Fraction(1),)) == (3 * documents,)


def test_a_block_repeats_no_source_unless_that_is_tiny() -> None:
    exact = shares([0.9, 0.1])
    size = block_documents([10**6, 200], exact)
    assert MIN_BLOCK_DOCUMENTS < size <= 2000 and size * exact[1] <= 200
    assert MIN_BLOCK_DOCUMENTS - 10 < block_documents([10**6, 5], exact) <= MIN_BLOCK_DOCUMENTS
