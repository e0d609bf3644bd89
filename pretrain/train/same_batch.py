"""Tensor- and pipeline-parallel ranks of one data-parallel coordinate must train on one batch.

Each reads it for itself: the order is a pure function, so nothing need be sent between them. What they read
is compared in every step, since a rank that sees another file (a stale copy, a damaged one) would spoil the
run in silence.
"""

import zlib
from collections.abc import Sequence

from data_pipeline.stream.batch import Batch
from parallel.world import World

_SAMPLES_SHOWN = 8


class BatchMismatch(RuntimeError):
    """Ranks that share a batch have read different bytes; names step, ranks and samples."""


def require_same_batch(micro_batches: Sequence[Batch], *, step: int, world: World) -> None:
    """Raise BatchMismatch on the ranks of a data-parallel coordinate if they hold different batches.

    All ranks call it. Without tensor- or pipeline-parallel ranks it does nothing, with them it is one
    all-reduce of two integers.
    """
    if world.tp_size * world.pp_size == 1:
        return
    digest = zlib.crc32(b"".join(batch.digest.to_bytes(4, "little") for batch in micro_batches))
    if world.same_in_model_group(digest):
        return
    names = [name for batch in micro_batches for sequence in batch.samples for name in sequence]
    found = world.gather((world.rank, f"{digest:08x}", names[:_SAMPLES_SHOWN]), world.model_group)
    lines = [f"rank {rank} has {digest}, samples {', '.join(names)} ..." for rank, digest, names in found]
    raise BatchMismatch(
        f"step {step}: ranks that must train on one batch have read different ones (crc32):\n  "
        + "\n  ".join(lines)
        + "\nThe step was not made. Do all nodes see the same files under data.train? Compare the SHA-256 of "
        "the shards with those in their manifest.json on each node, then start again"
    )
