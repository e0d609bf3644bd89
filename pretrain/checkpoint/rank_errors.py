"""Work that fails on all ranks if it fails on one: all raise the same error, so no rank waits for ever."""

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from parallel.world import World
from pretrain.checkpoint.folder import CheckpointError

UNTOUCHED = "Other checkpoints are untouched"


def on_all_ranks(world: World, work: Callable[[], Any], failure: str) -> list[Any]:
    """Do `work` on every rank; returns the results in rank order.

    If it fails on one rank, all ranks raise CheckpointError, whose text begins with `failure`.
    """
    result, error = None, None
    try:
        result = work()
    except (OSError, RuntimeError, ValueError, SafetensorError) as caught:  # RuntimeError: out of memory
        error = caught
    outcomes = world.gather((result, None if error is None else error_text(world, failure, error)))
    for _, message in outcomes:
        if message is not None:
            raise CheckpointError(message) from error
    return [result for result, _ in outcomes]


def on_rank_0(world: World, work: Callable[[], Any], failure: str) -> None:
    """Do `work` on rank 0. If it fails, all ranks raise CheckpointError."""
    on_all_ranks(world, work if world.rank == 0 else lambda: None, failure)


def error_text(world: World, failure: str, error: Exception) -> str:
    """The message about a failure on this rank."""
    return f"{failure} (rank {world.rank}): {error}. {UNTOUCHED}"
