import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from parallel.routing import route, sequence_to_sorted, sorted_to_sequence, tokens_of_towers


@given(
    modality=st.lists(st.integers(0, 3), min_size=1, max_size=60),
    towers=st.lists(st.integers(0, 2), min_size=4, max_size=4),
)
def test_sorted_order_is_by_tower_and_stable(modality: list[int], towers: list[int]) -> None:
    routing = route(np.array(modality, np.uint8), towers, 3)
    expected = sorted(range(len(modality)), key=lambda i: towers[modality[i]])  # Python's sort is stable
    assert routing.to_sorted.tolist() == expected
    assert [routing.to_sorted[i] for i in routing.to_sequence] == list(range(len(modality)))
    assert routing.counts == tuple(sum(towers[m] == t for m in modality) for t in range(3))
    assert routing.identity == (len({towers[m] for m in modality}) == 1)


def test_counts_are_python_ints_and_name_absent_towers() -> None:
    routing = route(np.array([2, 0, 2, 0], np.uint8), (0, 1, 2), 3)
    assert routing.counts == (2, 0, 2)
    assert all(type(count) is int for count in routing.counts)
    assert routing.to_sorted.dtype == torch.int64


def test_one_tower_moves_nothing() -> None:
    routing = route(np.array([2, 0, 1], np.uint8), (0, 0, 0), 1)
    x = torch.randn(3, 4)
    assert sequence_to_sorted(x, routing) is x
    assert sorted_to_sequence(x, routing) is x


def test_permutation_has_autograds_gradient() -> None:
    routing = route(np.array([1, 0, 2, 1, 0], np.uint8), (0, 1, 2), 3)
    x = torch.randn(5, 3, requires_grad=True)
    assert torch.equal(sequence_to_sorted(x, routing)[routing.to_sequence], x)
    grad = torch.randn(5, 3)
    (expected,) = torch.autograd.grad(x[routing.to_sorted], x, grad)
    (got,) = torch.autograd.grad(sequence_to_sorted(x, routing), x, grad)
    assert torch.equal(got, expected)
    assert torch.equal(sorted_to_sequence(x, routing), x[routing.to_sequence])
    (expected,) = torch.autograd.grad(x[routing.to_sequence], x, grad)
    (got,) = torch.autograd.grad(sorted_to_sequence(x, routing), x, grad)
    assert torch.equal(got, expected)


def test_a_modality_is_a_slice_of_its_tower() -> None:
    """Image and speech share a tower that comes after, text and glyphs one that comes before."""
    modality = np.array([1, 0, 2, 3, 1, 0, 3, 2, 2, 0])
    routing = route(modality, [0, 1, 1, 0], 2, by_modality=True)
    assert routing.counts == (5, 5)
    assert modality[routing.to_sorted.numpy()].tolist() == [0, 0, 0, 3, 3, 1, 1, 2, 2, 2]
    assert routing.modality_rows == ((0, 3), (5, 7), (7, 10), (3, 5))
    assert routing.to_sorted.tolist() == [1, 5, 9, 3, 6, 0, 4, 2, 7, 8]  # in sequence order inside a slice
    assert torch.equal(routing.to_sequence[routing.to_sorted], torch.arange(10))
    assert not routing.identity and route(np.zeros(3, int), [0, 0], 1, by_modality=True).identity


def test_an_absent_modality_is_an_empty_slice() -> None:
    routing = route(np.array([2, 0, 2]), [0, 0, 0], 1, by_modality=True)
    assert routing.modality_rows == ((0, 1), (1, 1), (1, 3))


def test_tokens_of_a_tower_are_in_sequence_order_without_padding() -> None:
    """Two sequences of five; the second tower is sorted by modality, so its rows are not in that order."""
    modality = np.array([1, 0, 2, 1, 0, 2, 1, 0, 2, 0])
    routing = route(modality, [0, 1, 1], 2, by_modality=True)
    places = routing.to_sorted.numpy()
    assert places.tolist() == [1, 4, 7, 9, 0, 3, 6, 2, 5, 8]
    text, other = tokens_of_towers(routing.counts, places, places != 9, 2, 5)
    assert text.rows is not None and text.rows.tolist() == [0, 1, 2] and text.per_sequence == (2, 1)
    assert other.rows is not None and other.rows.tolist() == [0, 3, 1, 4, 2, 5]
    assert other.per_sequence == (3, 3)
    whole, none = tokens_of_towers((2, 0), np.array([5, 8]), np.ones(2, bool), 3, 5)
    assert whole.rows is None and whole.per_sequence == (0, 2, 0) and none.per_sequence == (0, 0, 0)
