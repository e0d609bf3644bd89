import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.stream.packing import cut, pack, spans_fit


@st.composite
def documents(draw: st.DrawFn) -> tuple[int, np.ndarray]:
    """(slots, spans) of a document: text and spans of 2 ... 30 ids in any order between <bos> and <eos>."""
    position, spans = 1, []
    for is_span, size in draw(st.lists(st.tuples(st.booleans(), st.integers(2, 30)), max_size=20)):
        if is_span:
            spans.append((position, position + size))
        position += size
    return position, np.array(spans, np.int64).reshape(-1, 2)


@given(document=documents(), context=st.integers(1, 60))
def test_pieces_tile_a_document_fit_the_context_and_spare_every_span(
    document: tuple[int, np.ndarray], context: int
) -> None:
    slots, spans = document
    pieces = cut(slots, spans, context)
    if slots > context and not spans_fit(spans, context):
        assert pieces == []
        return
    assert pieces[0][0] == 0 and sum(n for _, n in pieces) == slots
    for (start, n), (following, _) in zip(pieces, [*pieces[1:], (slots, 0)], strict=True):
        assert 1 <= n <= context and start + n == following
    borders = np.array([start for start, _ in pieces])
    for start, end in spans:
        # as input, all ids of a span are in one piece: no piece starts at its second id or later
        assert not ((borders > start) & (borders < end)).any()


def test_a_document_that_fits_is_not_cut() -> None:
    assert cut(10, np.array([[2, 9]]), 10) == [(0, 10)]
    assert cut(10, np.zeros((0, 2), np.int64), 10) == [(0, 10)]


def test_text_is_cut_where_the_context_ends() -> None:
    assert cut(25, np.zeros((0, 2), np.int64), 10) == [(0, 10), (10, 10), (20, 5)]


def test_a_border_of_a_span_is_preferred_to_a_cut_in_text() -> None:
    spans = np.array([[3, 8]])  # ends in the second half of the first 10 slots
    assert cut(25, spans, 10) == [(0, 8), (8, 10), (18, 7)]
    two = np.array([[3, 6], [6, 9]])  # of several borders the last one
    assert cut(25, two, 10) == [(0, 9), (9, 10), (19, 6)]
    early = np.array([[1, 4]])  # a border so early would leave more than half of the context empty
    assert cut(25, early, 10) == [(0, 10), (10, 10), (20, 5)]


def test_a_span_that_would_be_cut_goes_to_the_next_piece_whole() -> None:
    assert cut(20, np.array([[4, 14]]), 10) == [(0, 4), (4, 10), (14, 6)]


def test_a_document_with_a_span_that_no_sequence_holds_gives_nothing() -> None:
    assert cut(40, np.array([[4, 15]]), 10) == []
    assert not spans_fit(np.array([[4, 15]]), 10) and spans_fit(np.array([[4, 14]]), 10)


def _best_fit(slots: list[int], capacity: int) -> list[int]:
    """The same by a search through all open sequences; of equally full ones the one that became so last."""
    room: list[int] = []
    touched: list[int] = []
    result = [0] * len(slots)
    order = sorted(range(len(slots)), key=lambda i: -slots[i])
    for time, i in enumerate(order):
        fitting = [s for s in range(len(room)) if room[s] >= slots[i]]
        if fitting:
            sequence = min(fitting, key=lambda s: (room[s], -touched[s]))
        else:
            sequence = len(room)
            room.append(capacity)
            touched.append(0)
        room[sequence] -= slots[i]
        touched[sequence] = time
        result[i] = sequence
    return result


@given(capacity=st.integers(1, 50), data=st.data())
def test_pack_is_best_fit_decreasing(capacity: int, data: st.DataObject) -> None:
    slots = data.draw(st.lists(st.integers(1, capacity), min_size=1, max_size=60))
    assert pack(np.array(slots), capacity).tolist() == _best_fit(slots, capacity)


def test_pack_fills_nearly_everything() -> None:
    rng = np.random.default_rng(0)
    slots = np.minimum(rng.lognormal(6, 1.1, 4000).astype(int) + 1, 4096)
    sequences = pack(slots, 4096)
    filled = np.bincount(sequences, weights=slots)
    assert filled.max() <= 4096
    assert slots.sum() / (len(filled) * 4096) > 0.998  # 0.9988 here
