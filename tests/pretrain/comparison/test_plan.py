"""The plan of a comparison as a value. How it follows from its file is in test_config.py."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pretrain.comparison.config import make_plan


def test_runs_that_come_first_are_made_next(comparison_files: Callable[..., Any]) -> None:
    plan = make_plan(comparison_files().comparison)
    assert plan.next_runs == plan.runs and plan.first == ()
    assert replace(plan, first=plan.runs[:2]).next_runs == plan.runs[:2]
    assert plan.runs[0].cell_arm == ("", "dense")


def test_an_arm_can_be_left_out(comparison_files: Callable[..., Any]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    plan = make_plan(comparison_files(edit=lambda text: text + third).comparison)
    assert plan.without(["mot"]).arms == ("dense", "pair") and plan.without([]) is plan
