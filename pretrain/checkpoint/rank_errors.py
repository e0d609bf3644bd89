"""Work whose failure on one rank is everybody's: all raise the same error, none waits for another in vain."""

from collections.abc import Callable
from typing import Any

from safetensors import SafetensorError

from parallel.world import World
from pretrain.checkpoint.folder import CheckpointError

UNTOUCHED = "Other checkpoints are untouched"


def on_all_ranks(world: World, work: Callable[[], Any], failure: str) -> list[Any]:
    """Do the work on every rank; returns what each returned, in rank order. Where one fails, all raise."""
    result, error = None, None
    try:
        result = work()
    except (OSError, RuntimeError, ValueError, SafetensorError) as caught:  # RuntimeError: no memory
        error = caught
    outcomes = world.gather((result, None if error is None else error_text(world, failure, error)))
    for _, message in outcomes:
        if message is not None:
            raise CheckpointError(message) from error
    return [result for result, _ in outcomes]


def on_rank_0(world: World, work: Callable[[], Any], failure: str) -> None:
    """Do the work on rank 0. Where it fails, all ranks raise."""
    on_all_ranks(world, work if world.rank == 0 else lambda: None, failure)


def error_text(world: World, failure: str, error: Exception) -> str:
    """The message of a failure on this rank."""
    return f"{failure} (rank {world.rank}): {error}. {UNTOUCHED}"
