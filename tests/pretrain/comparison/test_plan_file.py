"""comparison.json binds the plan, which may only grow."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.caveats import caveats
from pretrain.comparison.config import make_plan
from pretrain.comparison.findings import find
from pretrain.comparison.plan_file import Addition, additions, check_same_plan, write_plan
from pretrain.comparison.results import load_results
from pretrain.comparison.verdict import joint_text
from tests.pretrain.conftest import Files

THIRD = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'


def test_the_plan_is_written_before_anything_runs_and_binds(comparison_files: Callable[..., Files]) -> None:
    files = comparison_files()
    plan = make_plan(files.comparison)
    write_plan(plan)
    written = json.loads((plan.directory / "comparison.json").read_text())
    assert written["comparison"]["question"] == plan.config.question
    assert written["runs"]["mot_seed2"]["model"]["towers"]["image"] == "image"
    write_plan(make_plan(files.comparison))  # the same plan goes on
    write_plan(
        make_plan(files.comparison, ["comparison.concurrent_runs=2"])
    )  # how it is run is no part of it
    for change, shown in (
        ("optimizer.learning_rate=2e-3", r"dense_seed1.optimizer.learning_rate: 0.002 .* 0.001 there"),
        ("comparison.seeds=[1, 2]", r"comparison.seeds: .*\n  run dense_seed3: only there"),
        ("comparison.question=Another", "comparison.question: 'Another'"),
    ):
        with pytest.raises(ConfigError, match=shown):
            write_plan(make_plan(files.comparison, [change]))
    assert json.loads((plan.directory / "comparison.json").read_text())["comparison"]["concurrent_runs"] == 2


def test_a_directory_with_foreign_runs_is_refused(
    synthetic_plan: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    (plan.directory / "comparison.json").unlink()
    with pytest.raises(ConfigError, match=r"holds runs but no comparison\.json"):
        write_plan(plan)


def test_a_plan_that_was_never_made_or_was_edited_is_named(synthetic_plan: Callable[..., Any]) -> None:
    plan = synthetic_plan(seeds=(1,))
    with pytest.raises(ConfigError, match="nothing has run yet"):
        check_same_plan(plan)
    plan.directory.mkdir(parents=True)
    (plan.directory / "comparison.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        check_same_plan(plan)


def test_seeds_and_arms_may_be_added_and_the_level_is_then_nominal(
    synthetic_plan: Callable[..., Any], write_runs: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = synthetic_plan()
    write_plan(first)
    write_plan(synthetic_plan(seeds=(1, 2, 3, 4)))  # nothing has finished, so nothing was seen
    assert additions(first) == ()
    monkeypatch.setattr("pretrain.comparison.plan_file.finished_step", lambda config: config.num_steps)
    grown = synthetic_plan(seeds=(1, 2, 3, 4), edit=lambda text: text + THIRD)
    with pytest.raises(ConfigError, match=r"run pair_seed1: only in compare\.toml"):
        check_same_plan(grown)
    write_runs(grown, noise=0.004)  # writes the plan
    write_plan(grown)
    names = tuple(f"pair_seed{seed}" for seed in (1, 2, 3, 4))
    assert additions(grown) == (Addition(runs=names, finished=8),)
    found = find(grown, load_results(grown), additions(grown))
    assert caveats(found)[0].text.startswith(
        "pair_seed1, pair_seed2, pair_seed3 and pair_seed4 were added after 8"
    )
    assert joint_text(found) == "(6 verdicts, jointly at a nominal 95 %)"
    with pytest.raises(ConfigError, match="run pair_seed1: only there"):
        write_plan(first)
