import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.stream.mixture import (
    BLOCK_DOCUMENTS,
    MIN_BLOCK_DOCUMENTS,
    ORDER,
    WeightsOf,
    blocks_of,
    document_weights,
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
    blocks = blocks_of([10**7] * len(weights), exact, ORDER)
    for block in range(50):
        before, after = drawn_before(block, blocks), drawn_before(block + 1, blocks)
        assert [b - a for a, b in zip(before, after, strict=True)] == [share * blocks.size for share in exact]


@given(weights=WEIGHTS, sizes=SIZES, block=st.integers(0, 10**6), order=st.sampled_from([1, 2]))
def test_no_source_is_ever_a_document_away_from_its_share(
    weights: list[float], sizes: list[int], block: int, order: int
) -> None:
    exact = shares(weights)
    blocks = blocks_of(sizes[: len(weights)], exact, order)
    assert 0 < blocks.size <= max(BLOCK_DOCUMENTS, MIN_BLOCK_DOCUMENTS)
    drawn, after = drawn_before(block, blocks), drawn_before(block + 1, blocks)
    at_most = min(Fraction(count + 1) / share for count, share in zip(drawn, exact, strict=True))
    for count, share in zip(drawn, exact, strict=True):
        assert count / share < at_most, "one number of documents, each source's share of it rounded down"
    assert all(a <= b for a, b in zip(drawn, after, strict=True))
    assert sum(after) - sum(drawn) <= BLOCK_DOCUMENTS + len(weights)


@given(documents=st.integers(1, 10**9), order=st.sampled_from([1, 2]))
def test_an_epoch_of_one_source_is_a_whole_number_of_blocks(documents: int, order: int) -> None:
    blocks = blocks_of([documents], (Fraction(1),), order)
    assert blocks.size <= BLOCK_DOCUMENTS
    in_epoch = documents / blocks.size
    assert in_epoch.denominator == 1
    assert drawn_before(int(in_epoch) * 3, blocks) == (3 * documents,)


@given(weights=WEIGHTS, sizes=st.lists(st.integers(1, 2000), min_size=5, max_size=5))
def test_no_block_goes_past_the_end_of_an_epoch(weights: list[float], sizes: list[int]) -> None:
    """Of several sources, the documents of a block are of one epoch, or of the whole epochs of a tiny one."""
    exact = shares(weights)
    sizes = sizes[: len(weights)]
    blocks = blocks_of(sizes, exact, ORDER)
    before = (0,) * len(weights)
    for block in range(1, 40):
        drawn = drawn_before(block, blocks)
        for first, last, n, share in zip(before, drawn, sizes, exact, strict=True):
            tiny = len(sizes) > 1 and n < MIN_BLOCK_DOCUMENTS * share
            together = n * -(-MIN_BLOCK_DOCUMENTS * share // n) if tiny else n
            assert last == first or first // together == (last - 1) // together
        before = drawn


def test_few_blocks_are_small() -> None:
    """A source ends a block once in MIN_BLOCK_DOCUMENTS documents at most, whatever its size."""
    exact = shares([0.9, 0.1])
    for sizes in ([10**6, 200], [10**6, 5], [7, 5]):
        blocks = blocks_of(sizes, exact, ORDER)
        assert sum(drawn_before(1000, blocks)) >= 1000 * MIN_BLOCK_DOCUMENTS / (len(sizes) + 1)


def test_the_first_order_keeps_its_sizes() -> None:
    exact = shares([0.9, 0.1])
    assert [blocks_of(sizes, exact, 1).size for sizes in ([10**6, 200], [10**6, 5], [10**7] * 2)] == [
        2000, 250, 4000,
    ]  # fmt: skip


def test_weights_of_documents_are_returned_as_they_are() -> None:
    assert document_weights([0.35, 2], [10, 30], [7, 9], of="documents", temperature=None) == [0.35, 2]


@given(weights=WEIGHTS, documents=SIZES, mean_slots=st.lists(st.integers(1, 10**5), min_size=5, max_size=5))
def test_weights_of_tokens_share_out_slots(
    weights: list[float], documents: list[int], mean_slots: list[int]
) -> None:
    documents, mean_slots = documents[: len(weights)], mean_slots[: len(weights)]
    slots = [n * mean for n, mean in zip(documents, mean_slots, strict=True)]
    drawn = document_weights(weights, documents, slots, of="tokens", temperature=None)
    of_slots = [share * mean for share, mean in zip(shares(drawn), mean_slots, strict=True)]
    for share, asked in zip(of_slots, shares(weights), strict=True):
        assert float(share / sum(of_slots)) == pytest.approx(
            float(asked), rel=1e-10
        )  # weights keep 12 digits


def test_a_temperature_goes_from_sizes_to_equal_shares() -> None:
    documents, slots, asked = [100, 400], [10_000, 160_000], [1.0, 1.0]

    def ratio(of: WeightsOf, temperature: float) -> float:
        """Slots of the second source for one of the first, or documents."""
        first, second = document_weights(asked, documents, slots, of=of, temperature=temperature)
        return second / first * (400 / 100 if of == "tokens" else 1)

    assert ratio("documents", 1.0) == pytest.approx(4)
    assert ratio("documents", 2.0) == pytest.approx(2)
    assert ratio("tokens", 1.0) == pytest.approx(16)
    assert ratio("tokens", 4.0) == pytest.approx(2)
    assert ratio("tokens", 1e9) == pytest.approx(1)
