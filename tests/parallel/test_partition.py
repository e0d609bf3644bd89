import random
from itertools import combinations

import pytest

from parallel.partition import partition, stage_costs


def brute_force(costs: list[int], stages: int) -> list[tuple[int, ...]]:
    """All cuts whose stages each hold a block, embedding and head kept with theirs."""
    inner = range(2, len(costs) - 1)
    return [(0, *cut, len(costs)) for cut in combinations(inner, stages - 1)]


@pytest.mark.parametrize("seed", range(60))
def test_no_other_cut_has_a_cheaper_costliest_stage(seed: int) -> None:
    draw = random.Random(seed)
    blocks = draw.randint(1, 9)
    stages = draw.randint(1, blocks)
    costs = [draw.choice([0, draw.randint(0, 40)]) for _ in range(blocks + 2)]
    bounds = partition(costs, stages)
    candidates = brute_force(costs, stages)
    assert bounds in candidates

    def key(cut: tuple[int, ...]) -> tuple[object, ...]:
        found = stage_costs(costs, cut)
        return max(found), sum(n * n for n in found), cut

    assert bounds == min(candidates, key=key)


def test_equal_blocks_are_cut_evenly_with_fewer_layers_first() -> None:
    assert partition([0, *[5] * 8, 0], 4) == (0, 3, 5, 7, 10)
    # 7 blocks on 3 stages: whichever holds 3, the costliest costs as much; the first holds the fewest.
    assert partition([0, *[5] * 7, 0], 3) == (0, 3, 5, 9)


def test_a_costly_head_takes_blocks_from_its_stage() -> None:
    bounds = partition([0, *[10] * 8, 20], 2)
    assert bounds == (0, 6, 10) and stage_costs([0, *[10] * 8, 20], bounds) == [50, 50]


def test_one_stage_and_one_block_a_stage() -> None:
    assert partition([1, 2, 3], 1) == (0, 3)
    assert partition([0, 7, 1, 7, 99], 3) == (0, 2, 3, 5)


@pytest.mark.parametrize("stages", [0, 3])
def test_more_stages_than_blocks_are_refused(stages: int) -> None:
    with pytest.raises(ValueError, match="2 sublayers cannot be cut"):
        partition([0, 1, 1, 5], stages)


def test_many_layers_are_cut_at_once() -> None:
    draw = random.Random(0)
    costs = [0, *(draw.randint(1, 10**15) for _ in range(128)), 10**15]
    found = stage_costs(costs, partition(costs, 16))
    assert sum(found) == sum(costs) and max(found) < 1.3 * sum(costs) / 16


@pytest.mark.parametrize("seed", range(20))
def test_a_whole_block_is_not_cut(seed: int) -> None:
    draw = random.Random(seed)
    blocks = draw.randint(1, 5)
    whole = [block for block in range(blocks) if draw.random() < 0.6]
    stages = draw.randint(1, 2 * blocks - len(whole))
    costs = [draw.randint(0, 40) for _ in range(2 * blocks + 2)]
    bounds = partition(costs, stages, whole)
    legal = [cut for cut in brute_force(costs, stages) if not {2 * b + 2 for b in whole} & set(cut)]
    assert bounds in legal
    assert max(stage_costs(costs, bounds)) == min(max(stage_costs(costs, cut)) for cut in legal)
    with pytest.raises(ValueError, match="cannot be cut"):
        partition(costs, 2 * blocks - len(whole) + 1, whole)
