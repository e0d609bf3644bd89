"""Costs of a trunk, of its branches and of what was set aside: no step counts twice, and none is lost."""

import json
from pathlib import Path

from pretrain.lineage.branch import branch_config, make_branch
from pretrain.lineage.changes import change_of, make_change
from pretrain.lineage.costs import NOTHING, Costs, behind, inherited_and_own
from pretrain.metric_rows import inherited_row
from pretrain.run_dir import read_record
from pretrain.run_files import METRICS
from tests.pretrain.lineage.made_run import STEP_TOKENS, make_run, run_config


def costs(steps: int) -> Costs:
    return Costs(steps, steps * STEP_TOKENS, 1e6 * steps, 0.5 * steps)


def test_costs_of_a_trunk_and_its_branches_count_no_step_twice(tmp_path: Path) -> None:
    trunk = run_config(tmp_path)
    make_run(trunk, [5, 10, 15])
    config = branch_config(trunk, "b", [f"total_tokens={40 * STEP_TOKENS}"])
    make_branch(trunk, config, 10)
    assert inherited_and_own(config.run_dir) == (costs(10), NOTHING)
    row = {"step": 40, "tokens": 40 * STEP_TOKENS, "compute/train_flops": 4e7, "time/train_s": 20.0}
    (config.run_dir / METRICS).write_text(json.dumps(row) + "\n")
    assert inherited_and_own(config.run_dir) == (costs(10), costs(30))
    assert inherited_and_own(trunk.run_dir) == (NOTHING, costs(15))
    assert behind(config.run_dir, 10) == costs(30) and behind(config.run_dir, 40) == NOTHING
    assert inherited_row(read_record(config.run_dir)) == {
        "train/inherited_tokens": 10 * STEP_TOKENS,
        "compute/inherited_flops": 1e7,
        "time/inherited_s": 5.0,
    }
    assert inherited_row(read_record(trunk.run_dir)) == {}


def test_what_is_set_aside_is_in_the_record_and_in_no_sum(tmp_path: Path) -> None:
    run_dir = make_run(run_config(tmp_path), [5, 10, 15])
    make_change(run_dir, change_of("go back", run_dir, step=5))
    assert read_record(run_dir)["changes"][0]["set_aside"] == costs(10)._asdict()
    assert inherited_and_own(run_dir) == (NOTHING, costs(5))
