import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.shards.loss_mask import from_bytes, is_target, masked_ranges, to_bytes

PARTS = st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=8)


def naive(parts: list[tuple[int, bool]]) -> list[bool]:
    """Whether each id of `<bos> parts <eos>` is a target; <bos> is predicted by nothing."""
    return [False, *(loss for length, loss in parts for _ in range(length)), True]


@given(PARTS)
def test_ranges_are_the_parts_without_loss(parts: list[tuple[int, bool]]) -> None:
    lengths, loss = [n for n, _ in parts], [is_loss for _, is_loss in parts]
    ranges, counted = masked_ranges(lengths, loss), naive(parts)
    assert is_target(ranges, 0, sum(lengths) + 1).tolist() == counted[1:]
    assert (np.diff(ranges.reshape(-1)) > 0).all(), "neighbours are one range"
    if len(ranges):
        assert from_bytes(to_bytes(ranges), sum(lengths) + 2).tolist() == ranges.tolist()


@given(PARTS, st.integers(1, 7))
def test_pieces_count_what_the_whole_counts(parts: list[tuple[int, bool]], context: int) -> None:
    ranges, counted = masked_ranges([n for n, _ in parts], [loss for _, loss in parts]), naive(parts)
    slots = len(counted) - 1
    pieces = [is_target(ranges, start, min(context, slots - start)) for start in range(0, slots, context)]
    assert np.concatenate(pieces).tolist() == counted[1:]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes are no pairs"),
        (b"\1\0\0\0", "4 bytes are no pairs"),
        (to_bytes(np.array([[0, 2]])), "do not ascend within 6 ids"),
        (to_bytes(np.array([[2, 6]])), "do not ascend within 6 ids"),
        (to_bytes(np.array([[1, 3], [3, 4]])), "do not ascend within 6 ids"),
    ],
)
def test_other_content_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_bytes(content, 6)
