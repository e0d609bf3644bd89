"""A run of another length keeps shares of its steps."""

from collections.abc import Callable
from typing import Any

from pretrain.comparison.config import make_plan
from pretrain.comparison.run_length import with_steps


def test_warm_up_and_intervals_keep_their_share(comparison_files: Callable[..., Any]) -> None:
    config = make_plan(comparison_files().comparison).runs[0].config  # 600 steps, warm-up 20, eval every 20
    half = with_steps(config, 300, 600, source="test", intervals=True)
    assert (half.num_steps, half.optimizer.schedule.warmup_steps) == (300, 10)
    assert (half.every_steps.eval, half.every_steps.log, half.every_steps.checkpoint) == (10, 5, 50)
    assert half.every_steps.eval_conditional is None
    assert with_steps(config, 6, 600, source="test", intervals=True).every_steps.log == 1
    assert with_steps(config, 300, 600, source="test").every_steps == config.every_steps
