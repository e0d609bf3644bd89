"""What a step consumed, over all ranks: the digest of the bytes that were read, and what was unreadable."""

import sys
from dataclasses import replace

from data_pipeline.files.printable import first_names
from data_pipeline.stream.loader import StepBatch, check_readable
from parallel.world import World
from pretrain.train.state import TrainState

_PART_BITS = 16
"""Bits of a digest that are summed as one float64, which holds sums over 2^37 ranks exactly."""
_DIGEST_BITS = 64
_NAMES_SHOWN = 3


def over_all_ranks(batch: StepBatch, world: World) -> StepBatch:
    """`batch` with the digest of the whole step and the unreadable documents of all ranks, sorted.

    All ranks call it, after it was found that ranks which share a batch read the same.
    """
    shifts = range(0, _DIGEST_BITS, _PART_BITS)
    parts = [batch.digest >> shift & (1 << _PART_BITS) - 1 for shift in shifts]
    *sums, num_unreadable = world.sum_over_dp([*parts, len(batch.unreadable)])
    digest = sum(int(part) << shift for part, shift in zip(sums, shifts, strict=True)) % (1 << _DIGEST_BITS)
    names: set[str] = set()
    if num_unreadable:
        names.update(*world.gather(batch.unreadable, world.dp_group))
    return replace(batch, digest=digest, unreadable=tuple(sorted(names)))


def note_unreadable(
    batch: StepBatch, state: TrainState, world: World, *, num_documents: int, max_frac: float
) -> None:
    """Raise WrongChecksum on all ranks if the documents that were unreadable so far, in this run's attempts
    and on all its ranks, are more than `max_frac` of the `num_documents` of its sources. Rank 0 names new
    ones. `batch`: that of the step that comes next in `state`.
    """
    new = state.new_unreadable(batch)
    if not new:
        return
    check_readable([*state.unreadable, *new], num_documents, max_frac)
    if world.rank == 0:
        print(
            f"warning: step {state.step + 1}: {first_names(new, _NAMES_SHOWN)} cannot be read as "
            f"indexed (crc32); padding without loss stands there ({len(state.unreadable) + len(new)} of "
            f"{num_documents} documents so far)",
            file=sys.stderr,
            flush=True,
        )
