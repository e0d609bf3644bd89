"""Which runs a report may rest on, and what becomes of the others."""

from collections.abc import Callable

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult, load_results
from pretrain.comparison.scope import RunEnd, run_ends, scope_of

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]


@pytest.fixture
def results(synthetic_plan: MakePlan, write_runs: Write) -> dict[str, RunResult]:
    """Two arms and three seeds that all finished, by name."""
    plan = synthetic_plan()
    write_runs(plan, seed_noise=0.02)
    return {run.planned.name: run for run in load_results(plan)}


def test_all_finished_runs_count_also_of_seeds_that_other_arms_lack(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan()
    write_runs(plan, until=lambda arm, seed: {("mot", 2): 400, ("dense", 3): 0}.get((arm, seed)))
    scope = scope_of(plan, load_results(plan))
    assert (scope.seeds, scope.until_step, scope.interim) == ((1,), 600, False)
    assert scope.unfinished == ("mot_seed2", "dense_seed3")
    assert scope.used == {"dense_seed1", "mot_seed1", "dense_seed2", "mot_seed3"}


def test_an_unfinished_comparison_is_cut_where_all_arms_were_evaluated(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan, until=lambda arm, seed: {("dense", 1): 450, ("mot", 1): 330}.get((arm, seed), 0))
    scope = scope_of(plan, load_results(plan))
    assert (scope.seeds, scope.until_step, scope.interim) == ((1,), 320, True)


def test_nothing_to_report_on_is_said(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, until=lambda arm, seed: 0 if arm == "mot" else None)
    with pytest.raises(
        ConfigError, match=r"no seed has been evaluated in all arms \(dense, mot\).*mot_seed1"
    ):
        scope_of(plan, load_results(plan))


def test_seeds_that_differ_as_seeds_do_all_finished(results: dict[str, RunResult]) -> None:
    assert set(run_ends(list(results.values())).values()) == {RunEnd("finished")}


def test_a_run_whose_loss_is_far_above_its_other_seeds_diverged(results: dict[str, RunResult]) -> None:
    results["mot_seed2"].rows[-1]["eval/loss"] *= 1.52
    ends = run_ends(list(results.values()))
    assert {name for name, end in ends.items() if end.lost} == {"mot_seed2"}
    assert ends["mot_seed2"].kind == "diverged" and "that of another seed" in ends["mot_seed2"].why


def test_a_loss_that_is_no_number_diverged(results: dict[str, RunResult]) -> None:
    results["dense_seed1"].rows[-1]["eval/loss"] = float("nan")
    assert run_ends(list(results.values()))["dense_seed1"].why == "its held-out loss is nan"


def test_a_single_run_whose_training_loss_came_back_up_diverged(results: dict[str, RunResult]) -> None:
    run = results["mot_seed1"]
    for row in run.rows[-8:]:
        row["train/loss"] += 1.0
    end = run_ends([run])["mot_seed1"]
    assert end.kind == "diverged" and end.why.startswith("its training loss is ")
    # An evaluation that rises while training does not is overfitting, which all seeds share.
    for row in run.rows[-8:]:
        row["train/loss"] -= 1.0
        if "eval/loss" in row:
            row["eval/loss"] += 1.0
    assert run_ends([run])["mot_seed1"] == RunEnd("finished")


def test_a_run_that_failed_is_told_with_its_reason(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan()
    write_runs(plan, until=lambda arm, seed: 300 if seed == 3 else None)
    found = load_results(plan)
    failed = next(run for run in found if run.planned.name == "mot_seed3")
    failed.record["status"] = "failed"
    failed.record["attempts"][-1]["reason"] = "step 301 is not finite:\n  rank 0"
    scope = scope_of(plan, found)
    assert scope.lost == {"mot_seed3": RunEnd("failed", "step 301 is not finite:")}
    assert scope.unfinished == ("dense_seed3",) and scope.num_finished == 4


def test_an_arm_whose_runs_all_diverged_is_shown_with_them(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan)
    found = load_results(plan)
    for run in found:
        if run.arm == "mot":
            for row in run.rows[-8:]:
                row["train/loss"] += 2.0
    scope = scope_of(plan, found)
    assert set(scope.lost) == {"mot_seed1", "mot_seed2"} and scope.num_finished == 2
    assert scope.seeds == (1, 2) and not scope.interim and scope.diverged == ("mot",)
