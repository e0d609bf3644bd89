"""What a report says of seconds."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pretrain.comparison.config import make_plan
from pretrain.comparison.step_timing import StepTiming
from pretrain.comparison.timing_caveats import of_timing
from tests.pretrain.comparison.test_step_timing import equal_seconds, write_rounds


def test_the_ratio_and_a_restless_machine_are_told(comparison_files: Callable[..., Any]) -> None:
    files = comparison_files(edit=equal_seconds)
    plan = make_plan(files.comparison)
    assert list(of_timing(plan, ())) == []
    write_rounds(plan)
    plan = make_plan(files.comparison)
    steady, elsewhere = of_timing(plan, ())
    assert "a step of mot took 1.25 times as long as one of dense (95 % interval" in steady.text
    assert not steady.grave and elsewhere.grave and "on another machine" in elsewhere.text
    loose = {("", "dense"): StepTiming((1.0,) * 5), ("", "mot"): StepTiming((1.0, 1.5, 1.0, 1.2, 1.1))}
    restless, *_ = of_timing(replace(plan, timing=loose), ())
    assert restless.grave and "something else must have run" in restless.text
