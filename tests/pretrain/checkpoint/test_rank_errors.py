import pytest

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.checkpoint.folder import CheckpointError
from pretrain.checkpoint.rank_errors import on_all_ranks, on_rank_0


def _work(failing_rank: int | None, error: type[Exception]) -> tuple[list[int] | str, str]:
    w = world.start(ParallelConfig())
    places = []

    def work() -> int:
        places.append(w.rank)
        if w.rank == failing_rank:
            raise error("no room")
        return 10 + w.rank

    try:
        result = on_all_ranks(w, work, "it cannot be done")
        on_rank_0(w, work, "nor this")
    except CheckpointError as caught:
        return str(caught), repr(places)
    return result, repr(places)


def test_results_of_all_ranks_are_on_all_ranks() -> None:
    ranks = run_on_ranks(_work, 2, None, OSError)
    assert ranks == [([10, 11], "[0, 0]"), ([10, 11], "[1]")]


@pytest.mark.parametrize("error", [OSError, RuntimeError, CheckpointError])
def test_a_failure_is_everybodys(error: type[Exception]) -> None:
    for message, _ in run_on_ranks(_work, 2, 1, error):
        assert message == "it cannot be done (rank 1): no room. Other checkpoints are untouched"
