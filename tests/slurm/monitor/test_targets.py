import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.plan_file import write_plan
from slurm.monitor.targets import ComparisonTarget, RunTarget, run_target, target, targets_under
from slurm.records import read_json
from tests.pretrain.conftest import comparison_files  # noqa: F401
from tests.slurm.run_directories import write_run


def test_a_run_by_file_overrides_and_directory(comparison_files: Callable[..., Any]) -> None:  # noqa: F811
    file = comparison_files().base
    found = target(file, ["name=other"])
    assert isinstance(found, RunTarget) and found.directory.name == "other" and found.config
    run = write_run(found.directory.parent, name="other", job={})
    assert target(found.directory) == RunTarget(found.directory, run)
    with pytest.raises(ConfigError, match="takes no overrides"):
        target(found.directory, ["name=x"])


def test_a_comparison_by_file_and_directory(comparison_files: Callable[..., Any]) -> None:  # noqa: F811
    file = comparison_files().comparison
    found = target(file, ["comparison.seeds=[1]"])
    assert isinstance(found, ComparisonTarget)
    assert [run.directory.name for run in found.runs] == ["dense_seed1", "mot_seed1"]
    write_plan(make_plan(file, ["comparison.seeds=[1]"]))
    assert target(found.directory) == found
    assert targets_under(found.directory.parent) == [found]
    with pytest.raises(ConfigError, match=r"is a comparison; name one of its runs: .*dense_seed1"):
        run_target(file)


def test_the_grid_of_an_arm_that_was_added_is_found_beside_the_runs(
    comparison_files: Callable[..., Any],  # noqa: F811
) -> None:
    """`motley cancel` of the directory finds its jobs."""
    plan = make_plan(comparison_files().comparison)
    write_plan(plan)
    record = read_json(plan.directory / "comparison.json")
    grid = {"tuning/mot_rate0.001_seed101": record["runs"]["mot_seed1"]}
    (plan.directory / "comparison.json").write_text(json.dumps(record | {"first": grid}))
    found = target(plan.directory)
    assert isinstance(found, ComparisonTarget)
    assert [run.directory.name for run in found.runs[-2:]] == ["mot_seed3", "mot_rate0.001_seed101"]


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"empty: holds neither a run .* nor a comparison"):
        target(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no such file"):
        target(tmp_path / "nowhere.toml")
    assert targets_under(tmp_path) == []


def test_half_written_files_are_no_error(tmp_path: Path) -> None:
    run = write_run(tmp_path, job={})
    (run.run_dir / "config.resolved.json").unlink()
    submitted = run.run_dir / "slurm" / "1" / "config.json"
    submitted.write_text(run.model_dump_json())
    assert target(run.run_dir) == RunTarget(run.run_dir, run)  # queued: the job has not made its directory
    submitted.write_text(json.dumps({"name": "tiny"}))
    assert target(run.run_dir) == RunTarget(run.run_dir, None)
    submitted.write_text('{"na')
    assert target(run.run_dir) == RunTarget(run.run_dir, None)
    assert read_json(submitted) == {}
