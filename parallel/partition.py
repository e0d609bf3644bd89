"""The partition of sublayers into pipeline stages, as an exact pure function. It imports no torch."""

from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate, pairwise


def partition(costs: Sequence[int], stages: int, whole_blocks: Collection[int] = ()) -> tuple[int, ...]:
    """Cut a decoder into contiguous stages so that the costliest stage costs as little as possible.

    `costs`: the cost, such as FLOPs, of embedding, of the sublayers of blocks, and of final norm with head.
    Returns `stages` + 1 ascending bounds: stage s holds bounds[s] up to bounds[s + 1]. Every stage holds a
    sublayer of a block; embedding and head stay with their neighbour. The sublayers of `whole_blocks`
    (numbers from 0) stay together.

    All cuts are compared, by dynamic programming. Among cuts with the same costliest stage, the most even one
    is taken (least sum of squares); among those, the one with fewer sublayers on the first stages, which keep
    the activations of most micro-batches.

    Raises ValueError if there are more stages than pieces: sublayers of blocks, with whole blocks as one
    piece.
    """
    ends = _possible_cuts(len(costs), whole_blocks)
    pieces = len(ends) - 1
    if not 1 <= stages <= pieces:
        raise ValueError(f"{pieces} sublayers cannot be cut into {stages} stages of at least one each")
    sums = [0, *accumulate(costs)]

    def cost(start: int, end: int) -> int:
        return sums[ends[end]] - sums[ends[start]]

    @cache
    def costliest(start: int, left: int) -> int:
        """The least possible cost of the costliest of `left` stages that hold the pieces from `start` on."""
        if left == 1:
            return cost(start, pieces)
        return min(
            max(cost(start, end), costliest(end, left - 1)) for end in range(start + 1, pieces - left + 2)
        )

    limit = costliest(0, stages)

    @cache
    def evenest(start: int, left: int) -> tuple[int, tuple[int, ...]] | None:
        """The best (sum of squares, bounds after `start`) with all stages within `limit`, or None."""
        options = []
        for end in (pieces,) if left == 1 else range(start + 1, pieces - left + 2):
            rest = (0, ()) if left == 1 else evenest(end, left - 1)
            if rest is not None and cost(start, end) <= limit:
                options.append((cost(start, end) ** 2 + rest[0], (ends[end], *rest[1])))
        return min(options, default=None)

    best = evenest(0, stages)
    assert best is not None, (costs, stages)
    return (0, *best[1])


def _possible_cuts(num_costs: int, whole_blocks: Collection[int]) -> list[int]:
    """The bounds of stages that are allowed: not after embedding, not before head, not in a whole block."""
    last = num_costs - 2
    inside = {2 * block + 2 for block in whole_blocks}
    return [0, *(bound for bound in range(2, last + 1) if bound not in inside), last + 2]


def stage_costs(costs: Sequence[int], bounds: Sequence[int]) -> list[int]:
    """The sum of costs of every stage."""
    return [sum(costs[start:end]) for start, end in pairwise(bounds)]
