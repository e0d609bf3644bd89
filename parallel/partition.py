"""Which sublayers go to which pipeline stage. Pure, exact; imports no torch."""

from collections.abc import Collection, Sequence
from functools import cache
from itertools import accumulate, pairwise


def partition(costs: Sequence[int], stages: int, whole_blocks: Collection[int] = ()) -> tuple[int, ...]:
    """Cut a decoder into contiguous stages so that the costliest stage costs as little as possible.

    `costs`: of embedding, the sublayers of the blocks, final norm and head, for instance in FLOPs. Returns
    `stages` + 1 ascending bounds: stage s holds bounds[s] up to bounds[s + 1]. Every stage holds a sublayer
    of a block; embedding and head stay with the one beside them. All such cuts are compared, by dynamic
    programming. Of those with the same costliest stage the most even one is taken (least sum of squares), and
    of those the one with fewer sublayers on the first stages, which keep the activations of most
    micro-batches.

    The two sublayers of each of `whole_blocks` (numbers from 0) stay together.

    Raises ValueError where there are more stages than sublayers of blocks, those of whole ones counted once.
    """
    last = len(costs) - 2
    inside = {2 * block + 2 for block in whole_blocks}
    ends = [0, *(bound for bound in range(2, last + 1) if bound not in inside), last + 2]
    """Where a cut may be: bounds in `costs` before, between and after these sublayers."""
    blocks = len(ends) - 1
    if not 1 <= stages <= blocks:
        raise ValueError(f"{blocks} sublayers cannot be cut into {stages} stages of at least one each")
    sums = [0, *accumulate(costs)]

    def cost(start: int, end: int) -> int:
        return sums[ends[end]] - sums[ends[start]]

    @cache
    def costliest(start: int, left: int) -> int:
        """Of sublayers `start` on, cut into `left` stages."""
        if left == 1:
            return cost(start, blocks)
        return min(
            max(cost(start, end), costliest(end, left - 1)) for end in range(start + 1, blocks - left + 2)
        )

    limit = costliest(0, stages)

    @cache
    def evenest(start: int, left: int) -> tuple[int, tuple[int, ...]] | None:
        """(sum of squares, bounds after `start`) with no stage above `limit`; None if there is none."""
        found = []
        for end in (blocks,) if left == 1 else range(start + 1, blocks - left + 2):
            rest = (0, ()) if left == 1 else evenest(end, left - 1)
            if rest is not None and cost(start, end) <= limit:
                found.append((cost(start, end) ** 2 + rest[0], (ends[end], *rest[1])))
        return min(found, default=None)

    best = evenest(0, stages)
    assert best is not None, (costs, stages)
    return (0, *best[1])


def stage_costs(costs: Sequence[int], bounds: Sequence[int]) -> list[int]:
    """Sum of the costs of each stage."""
    return [sum(costs[start:end]) for start, end in pairwise(bounds)]
