import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data_pipeline.stream.order import documents_at, key_of, mix, permute


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_hits_each_index_once(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(2**33, 2**40), first=st.integers(0, 2**32), key=st.integers(0, 2**64 - 1))
@settings(max_examples=25)
def test_permute_reaches_far_beyond_32_bits_and_stays_inside(n: int, first: int, key: int) -> None:
    image = permute(np.arange(first, first + 500), n, key)
    assert len(np.unique(image)) == 500
    assert image.min() >= 0 and image.max() < n


def test_permute_of_a_part_is_the_part_of_the_permutation() -> None:
    whole = permute(np.arange(1000), 1000, 7)
    some = np.array([[3, 999], [0, 3]])
    assert np.array_equal(permute(some, 1000, 7), whole[some])


def test_every_place_is_as_likely_as_any_other() -> None:
    """1,500 keys: where does an index go, and where the next one relative to it? Fixed keys, so no chance."""
    n = 20
    images = np.array([permute(np.arange(n), n, key_of(5, i)) for i in range(1_500)])
    # p is .95 and .29 here; a bound of 1e-4 would pass a good permutation 9,999 times of 10,000
    assert chisquare(np.bincount(images[:, 3], minlength=n)).pvalue > 1e-4
    step = (images[:, 4] - images[:, 3]) % n
    assert chisquare(np.bincount(step, minlength=n)[1:]).pvalue > 1e-4


def test_neighbours_are_spread_far_apart() -> None:
    n = 100_000
    image = permute(np.arange(n), n, 3)
    # 0.0 +- 1 / sqrt(n) = 0.003 for a random permutation
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.015
    assert abs(np.corrcoef(np.arange(n), image)[0, 1]) < 0.015


@given(
    n=st.integers(1, 700),
    chunk=st.integers(1, 12),
    window=st.integers(3, 9),
    key=st.integers(0, 2**32),
    pieces=st.lists(st.integers(0, 90), max_size=12),
)
@settings(max_examples=40)
def test_each_epoch_holds_each_document_once_however_it_is_asked_for(
    n: int, chunk: int, window: int, key: int, pieces: list[int]
) -> None:
    sizes = {"chunk_documents": chunk, "window_chunks": window}
    three = documents_at(0, 3 * n, n, key, **sizes)
    for epoch in range(3):
        assert np.array_equal(np.sort(three[epoch * n : (epoch + 1) * n]), np.arange(n))
    first = 0
    for count in pieces:
        count = min(count, 3 * n - first)
        assert np.array_equal(documents_at(first, count, n, key, **sizes), three[first : first + count])
        first += count


def test_epochs_and_keys_differ() -> None:
    first, second = documents_at(0, 2000, 1000, 9).reshape(2, 1000)
    other = documents_at(0, 1000, 1000, 10)
    # a random pair of permutations of 1000 agrees in one place on average, hardly ever in more than 8
    assert (first == second).sum() <= 8 and (first == other).sum() <= 8


def test_a_window_touches_a_bounded_number_of_chunks() -> None:
    n, chunk, window = 100_003, 10, 20
    documents = documents_at(0, chunk * window, n, 4, chunk_documents=chunk, window_chunks=window)
    # 20 chunks of 10 neighbours; turned by an offset each lies in at most two chunks of 10
    assert len(np.unique(documents // chunk)) <= 2 * window
    assert documents.max() - documents.min() > n // 2, "the chunks come from all over the source"


def test_the_documents_that_are_no_whole_chunk_change_with_the_epoch() -> None:
    n, sizes = 1003, {"chunk_documents": 10, "window_chunks": 5}
    last = [documents_at(e * n + 1000, 3, n, 4, **sizes) for e in range(20)]
    assert len({tuple(np.sort(documents)) for documents in last}) > 15


def test_mix_and_keys() -> None:
    words = np.arange(10_000, dtype=np.uint64) << np.uint64(40)
    assert len(np.unique(mix(words))) == 10_000
    assert int(mix(np.array([0x9E3779B97F4A7C15], np.uint64))[0]) == key_of(0)
    assert len({key_of(), key_of(0), key_of(1), key_of(0, 1), key_of(1, 0), key_of(0, 0)}) == 6
    with pytest.raises(ValueError, match="0 elements"):
        permute(np.arange(0), 0, 1)
