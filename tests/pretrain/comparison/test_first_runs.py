"""Runs that come first: what is said of them. They are made in tests/e2e/test_compare.py."""

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.first_runs import check_first_runs, check_startable, first_line
from tests.pretrain.comparison.test_rate_grid import with_grid


def test_there_is_no_report_before_they_have_ended(comparison_files: Callable[..., Any]) -> None:
    files = comparison_files(edit=with_grid)
    plan = make_plan(files.comparison)
    assert first_line(plan) == (
        "a grid of learning rates comes first: 2 arms x 3 rates x 2 tuning seed(s) = 12 runs; 0 have ended"
    )
    with pytest.raises(ConfigError, match=r"nothing to report on yet: a grid of .* leave out --report-only"):
        check_first_runs(plan)
    check_first_runs(make_plan(comparison_files().comparison))
    with pytest.raises(ConfigError, match=r"tokens/train.*no such folder"):
        check_startable(plan, plan.first)
