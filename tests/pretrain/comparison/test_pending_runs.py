"""Which runs are still to be made."""

from collections.abc import Callable

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.pending_runs import unfinished
from pretrain.comparison.plan import ComparisonPlan


def test_an_unfinished_run_and_only_that_is_run(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan, until=lambda arm, seed: {("mot", 1): 300, ("dense", 2): 0}.get((arm, seed)))
    assert [run.name for run in unfinished(plan)] == ["mot_seed1", "dense_seed2"]


def test_a_run_directory_of_another_config_is_refused(
    synthetic_plan: Callable[..., ComparisonPlan], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    path = plan.runs[1].config.run_dir / "config.resolved.json"
    path.write_text(path.read_text().replace('"learning_rate":0.001', '"learning_rate":0.003'))
    with pytest.raises(ConfigError, match="made by another config"):
        unfinished(plan)
