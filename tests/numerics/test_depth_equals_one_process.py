"""Decoders with depth routing on layouts of ranks: the one process, step for step."""

from typing import Any

import pytest

from tests.numerics.layouts import Towers, assert_equals_one_process, train_on

ALL: tuple[Towers, ...] = ("depth", "pmod", "depth_feed_forward")
BOTH: tuple[Towers, ...] = ("depth", "pmod")
WITH_EXPERTS: tuple[Towers, ...] = ("depth_experts",)


@pytest.mark.parametrize(
    ("ranks", "layout", "towers"),
    [
        (1, {}, BOTH),
        (2, {"tp": 2}, ALL),
        (2, {"tp": 2, "sequence_parallel": False, "zero_stage": 0}, BOTH),
        (2, {"zero_stage": 1}, ALL),
        (2, {"zero_stage": 3, "activation_checkpointing": True}, ALL),
        (2, {"pp": 2, "activation_checkpointing": True}, ALL),
        (4, {"tp": 2, "zero_stage": 3, "activation_checkpointing": True}, BOTH),
        (4, {"tp": 2, "pp": 2}, BOTH),
        (2, {"tp": 2}, WITH_EXPERTS),
        (2, {"tp": 2, "sequence_parallel": False, "zero_stage": 0}, WITH_EXPERTS),
        (2, {"zero_stage": 1}, WITH_EXPERTS),
        (2, {"zero_stage": 2}, WITH_EXPERTS),
        (2, {"zero_stage": 3, "activation_checkpointing": True}, WITH_EXPERTS),
        (2, {"pp": 2}, WITH_EXPERTS),
        (4, {"tp": 2, "pp": 2, "activation_checkpointing": True}, WITH_EXPERTS),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_ranks_equal_one_process(ranks: int, layout: dict[str, Any], towers: tuple[Towers, ...]) -> None:
    assert_equals_one_process(train_on(ranks, layout, towers))
