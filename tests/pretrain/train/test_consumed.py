"""What ranks read is one step: its digest and its unreadable documents are those of all ranks."""

import contextlib
import io
from typing import Any

import pytest

from data_pipeline.shards.faults import WrongChecksum
from data_pipeline.stream.loader import StepBatch
from data_pipeline.stream.stream import StreamState
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.train.consumed import note_unreadable, over_all_ranks
from pretrain.train.state import TrainState

STREAM = StreamState(0, 0, 0, seed=1, context_tokens=64, sources=(("hash", "1"),))
PARTS = (2**64 - 1, 2**63 + 5, 3)
"""Parts of a digest by rank; their sum exceeds 64 bits."""
UNREADABLE = (("d/2", "d/9"), (), ("d/1", "d/9"))


def _batch(digest: int, unreadable: tuple[str, ...]) -> StepBatch:
    return StepBatch((), (), STREAM, 0.0, 1.0, (0.5,), digest=digest, unreadable=unreadable)


def _gathered(tp: int) -> tuple[int, tuple[str, ...], int]:
    w = world.start(ParallelConfig(tp=tp))
    found = over_all_ranks(_batch(PARTS[w.dp_rank], UNREADABLE[w.dp_rank]), w)
    clean = over_all_ranks(_batch(1, ()), w)
    assert clean.unreadable == () and clean.digest == w.dp_size
    return found.digest, found.unreadable, w.dp_size


@pytest.mark.parametrize(("ranks", "tp"), [(3, 1), (4, 2)])
def test_all_ranks_have_the_digest_and_the_names_of_all(ranks: int, tp: int) -> None:
    dp = ranks // tp
    names = tuple(sorted({name for unreadable in UNREADABLE[:dp] for name in unreadable}))
    assert run_on_ranks(_gathered, ranks, tp) == [(sum(PARTS[:dp]) % 2**64, names, dp)] * ranks


def _noted() -> tuple[str, str, str]:
    w = world.start(ParallelConfig())
    first, second = _batch(1, ("d/1", "d/2")), _batch(1, ("d/2", "d/3", "d/4", "d/5", "d/6"))
    state = TrainState.start(STREAM)
    printed = [io.StringIO(), io.StringIO()]
    limit: dict[str, Any] = {"num_documents": 100, "max_frac": 0.06}
    with contextlib.redirect_stderr(printed[0]):
        note_unreadable(first, state, w, **limit)
    state = state.advance(first, {})
    with contextlib.redirect_stderr(printed[1]):
        note_unreadable(first, state, w, **limit)
        note_unreadable(second, state, w, **limit)
    try:
        note_unreadable(second, state, w, num_documents=100, max_frac=0.05)
    except WrongChecksum as error:
        return printed[0].getvalue(), printed[1].getvalue(), str(error)
    raise AssertionError("one document too many was taken")


def test_rank_0_names_new_ones_once_and_one_too_many_ends_all_ranks() -> None:
    (first, second, error), (nothing, none, same_error) = run_on_ranks(_noted, 2)
    assert first == (
        "warning: step 1: d/1, d/2 cannot be read as indexed (crc32); padding without loss stands there "
        "(2 of 100 documents so far)\n"
    )
    assert second.startswith("warning: step 2: d/3, d/4, d/5 and 1 more cannot") and second.count("\n") == 1
    assert "(6 of 100 documents so far)" in second
    assert (nothing, none) == ("", "") and error == same_error
    assert error.startswith("d/1, d/2, d/3 (and 3 more): cannot be read as indexed")


def test_without_any_allowed_the_first_one_ends_the_run() -> None:
    w: Any = None  # no rank is asked
    with pytest.raises(WrongChecksum, match="d/1: cannot be read"):
        note_unreadable(_batch(1, ("d/1",)), TrainState.start(STREAM), w, num_documents=9, max_frac=0.0)
