"""The formulas by hand, on small groups; tests/pretrain/planning/test_plan_memory.py has real engines."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from parallel.engine_memory import MemoryUse, buffers, frozen_memory, group_memory, update_copy

SIZES = [10, 7, 4]  # 21 elements; flat on 4 ranks 24, of which a rank has 6


@pytest.mark.parametrize(
    "stage, precision, expected",
    [
        (0, "fp32", MemoryUse(84, 84, 168)),
        (1, "fp32", MemoryUse(96, 84, 72)),
        (1, "bf16", MemoryUse(48, 4 * 24 + 2 * 21, 72)),
        (2, "bf16", MemoryUse(48, 24, 72)),
        (2, "fp32", MemoryUse(96, 4 * (10 + 7), 72)),  # the second rank has parts of two parameters
        (3, "bf16", MemoryUse(2 * (3 + 2 + 1) + 2 * 21, 24, 72)),  # all small enough to stay whole
    ],
)
def test_a_group_on_four_ranks(stage: int, precision: str, expected: MemoryUse) -> None:
    zero: dict[str, Any] = {"dp": 4, "zero_stage": stage, "precision": precision}
    assert group_memory(SIZES, **zero, state_bytes=8) == expected
    # One state less: 4 bytes of each of the 21, 6 or 6 elements.
    fewer = replace(expected, optimizer=expected.optimizer - (84 if stage == 0 else 24))
    assert group_memory(SIZES, **zero, state_bytes=4) == fewer


def test_of_stage_two_in_fp32_each_rank_holds_whole_parameters() -> None:
    of = [
        group_memory(SIZES, dp=4, zero_stage=2, precision="fp32", state_bytes=8, dp_rank=rank).gradients
        for rank in range(4)
    ]
    assert of == [4 * 10, 4 * 17, 4 * (7 + 4), 4 * 4]


def test_a_large_parameter_of_stage_three_is_not_kept_whole() -> None:
    of = partial(group_memory, zero_stage=3, precision="fp32", state_bytes=8)
    assert of([100_001], dp=2).parameters == 4 * 50_001
    assert of([100_000], dp=2).parameters == 4 * 150_000
    assert of([100_000], dp=1).parameters == 4 * 100_000


def test_frozen_parameters_have_neither_gradients_nor_states() -> None:
    assert frozen_memory(SIZES, dp=4, zero_stage=1, precision="bf16") == MemoryUse(parameters=42)
    assert frozen_memory([200_000], dp=4, zero_stage=3, precision="bf16") == MemoryUse(parameters=100_000)


def test_only_a_part_of_several_parameters_is_joined_for_the_update() -> None:
    assert update_copy({"a": SIZES}, dp=4, zero_stage=2, precision="fp32") == 4 * 6
    assert update_copy({"a": [24]}, dp=4, zero_stage=2, precision="fp32") == 0
    assert update_copy({"a": SIZES, "b": [400]}, dp=4, zero_stage=3, precision="bf16") == 4 * 100
    assert update_copy({"a": SIZES}, dp=4, zero_stage=1, precision="bf16") == 0


def test_groups_that_share_a_bucket_are_joined() -> None:
    """Stage 1 in bf16 closes a bucket once it is above 500 million elements."""

    def joined(*sizes: int) -> int:
        groups = {str(index): [size] for index, size in enumerate(sizes)}
        return buffers(groups, dp=1, zero_stage=1, precision="bf16")

    assert joined(600_000_000) == 0
    assert joined(600_000_000, 600_000_000) == 0
    assert joined(100_000_000, 600_000_000) == 4 * 700_000_000
    assert joined(600_000_000, 10, 20) == 4 * 30
