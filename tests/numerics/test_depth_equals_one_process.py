"""Decoders with depth routing on layouts of ranks: the one process, step for step."""

from typing import Any

import pytest

from tests.numerics.layouts import Towers, assert_all_equal_one_process, assert_equals_one_process

WHOLE_STREAM = {"sequence_parallel": False}


@pytest.mark.parametrize(
    ("ranks", "layout", "towers"),
    [
        (2, {"tp": 2, "zero_stage": 0}, ("depth", "pmod", "depth_experts")),
        (2, {"tp": 2, "zero_stage": 0, **WHOLE_STREAM}, ("depth_feed_forward", "depth_experts")),
        (2, {"pp": 2, "zero_stage": 0, "activation_checkpointing": True}, ("depth", "depth_experts")),
        pytest.param(4, {"tp": 2, "pp": 2, "zero_stage": 0}, ("depth_feed_forward",), marks=pytest.mark.full),
        (4, {"tp": 2, "pp": 2, "zero_stage": 0, "activation_checkpointing": True}, ("pmod", "depth_experts")),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_ranks_equal_one_process(ranks: int, layout: dict[str, Any], towers: tuple[Towers, ...]) -> None:
    """In fp64."""
    assert_equals_one_process(ranks, layout, towers)


def test_data_parallel_ranks_equal_one_process() -> None:
    """In fp64, but for those with ZeRO."""
    assert_all_equal_one_process(
        2,
        [
            ({"zero_stage": 0, "activation_checkpointing": True}, ("pmod",)),
            ({"zero_stage": 1}, ("depth",)),
            ({"zero_stage": 2}, ("depth_experts",)),
            ({"zero_stage": 3, "activation_checkpointing": True}, ("pmod", "depth_experts")),
        ],
    )
