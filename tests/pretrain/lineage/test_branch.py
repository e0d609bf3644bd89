"""A branch is a whole run of its own, or nothing, and its books are apart from those of its trunk."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import STATE, checkpoint_path, find_corruption, read_manifest
from pretrain.config import RunConfig, load
from pretrain.lineage import branch
from pretrain.lineage.branch import FIXED, LENGTH_KEYS, OTHER_KEYS, branch_config, make_branch
from pretrain.metrics import read_rows
from pretrain.run_dir import FREE_KEYS, check_config, read_record
from pretrain.run_files import CHECKPOINTS, METRICS, TRUNK
from pretrain.run_identity import check_origin, identity_of
from tests.pretrain.lineage.made_run import STEP_TOKENS, files_of, killed_at, make_run, run_config

LONGER = [f"total_tokens={40 * STEP_TOKENS}", "optimizer.schedule.kind=wsd"]


@pytest.fixture
def trunk(tmp_path: Path) -> RunConfig:
    """The config of a run with rows and checkpoints of steps 5, 10 and 15."""
    config = run_config(tmp_path)
    make_run(config, [5, 10, 15], spikes=[7, 12])
    return config


def test_a_branch_holds_what_it_needs_and_says_where_it_is_from(trunk: RunConfig) -> None:
    config = branch_config(trunk, "b", LONGER)
    told = make_branch(trunk, config, 10)
    parent = identity_of(read_record(trunk.run_dir))
    assert parent is not None
    assert told.startswith(f"{config.run_dir}: a branch of {trunk.run_dir} (run {parent.id}) at step 10")
    record = read_record(config.run_dir)
    own, path = identity_of(record), checkpoint_path(config.run_dir / CHECKPOINTS, 10)
    manifest, _ = read_manifest(path)
    assert own is not None and own.id != parent.id and find_corruption(path) == []
    check_origin(path, manifest["run"], own)
    check_config(config)
    assert load(config.run_dir) == config
    entry = record["branch"]
    assert (entry["run"], entry["step"], entry["as_without_trunk"]) == (parent.id, 10, True)
    assert (
        entry["manifest_sha256"]
        == read_manifest(checkpoint_path(trunk.run_dir / CHECKPOINTS, 10))[0]["sha256"]
    )
    assert entry["changed"] == {
        "optimizer.schedule.kind": ["constant", "wsd"],
        "total_tokens": [20 * STEP_TOKENS, 40 * STEP_TOKENS],
    }
    assert [row["step"] for row in read_rows(config.run_dir / TRUNK)] == [5, 10]
    assert [event["step"] for event in record["spikes"]["events"]] == [7]
    assert json.loads((path / STATE).read_text())["state"]["num_rows"] == 0
    shutil.rmtree(trunk.run_dir)
    assert find_corruption(path) == []  # a trunk that is deleted takes nothing with it


def test_a_process_killed_anywhere_leaves_no_branch_or_a_whole_one(trunk: RunConfig) -> None:
    whole = branch_config(trunk, "whole", LONGER)
    make_branch(trunk, whole, 10)
    moment, was_killed = 0, True
    while was_killed:
        moment += 1
        config = branch_config(trunk, f"b{moment}", LONGER)
        was_killed = killed_at(moment, lambda config=config: make_branch(trunk, config, 10))
        if not branch.exists(config, trunk, 10):
            make_branch(trunk, config, 10)
        assert files_of(config.run_dir).keys() == files_of(whole.run_dir).keys(), moment
        check_config(config)
    assert moment > 8


REFUSED = {
    "seed": ("seed=9", "seed = 9: a branch keeps 1, for the order of the data"),
    "a step's size": ("tokens_per_step=256", "tokens_per_step = 256: a branch keeps 128"),
    "the model": ("model.num_layers=3", "model.num_layers = 3: a branch keeps 2, for the weights of the"),
    "the data": (
        "data.heldout=elsewhere",
        'data.heldout = "elsewhere": a branch keeps null, for the position',
    ),
    "the optimizer": (
        "optimizer.kind=muon",
        'optimizer.kind = "muon": a branch keeps "adamw", for its states',
    ),
    "a second name": ("name=c", "name=c: --branch b names the new run; leave one of them out"),
    "a typo": (
        "optimizer.learning_rat=1",
        'optimizer.learning_rat: unknown key; did you mean "learning_rate"',
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_branch_may_not_change_is_refused_by_name(trunk: RunConfig, what: str) -> None:
    override, expected = REFUSED[what]
    with pytest.raises(ConfigError) as error:
        branch_config(trunk, "b", [override])
    assert expected in str(error.value)


def test_every_key_of_a_run_is_fixed_free_or_a_branchs_own() -> None:
    named = {key.partition(".")[0] for key in (*FIXED, *FREE_KEYS, *LENGTH_KEYS, *OTHER_KEYS)}
    assert named == RunConfig.model_fields.keys()


def test_a_branch_that_trains_otherwise_is_no_run_of_one_schedule(trunk: RunConfig) -> None:
    for number, override in enumerate(("optimizer.learning_rate=2e-3", "optimizer.schedule.warmup_steps=3")):
        config = branch_config(trunk, f"b{number}", [*LONGER, override])
        make_branch(trunk, config, 10)
        assert read_record(config.run_dir)["branch"]["as_without_trunk"] is False
    nested = branch_config(config, "nested", [f"total_tokens={50 * STEP_TOKENS}"])
    make_branch(config, nested, 10)
    assert read_record(nested.run_dir)["branch"]["as_without_trunk"] is False
    assert [row["step"] for row in read_rows(nested.run_dir / TRUNK)] == [5, 10]
    (config.run_dir / TRUNK).write_text("")
    with pytest.raises(ConfigError, match=r"trunk\.jsonl has changed"):
        make_branch(config, branch_config(config, "again", LONGER), 10)


def test_a_damaged_trunk_is_named_and_nothing_is_made(trunk: RunConfig) -> None:
    config = branch_config(trunk, "b", LONGER)
    file = checkpoint_path(trunk.run_dir / CHECKPOINTS, 10) / "engine/rank_00000.safetensors"
    file.write_bytes(b"weights 99")
    with pytest.raises(ConfigError, match="step_00000010 is damaged, so nothing goes on from there"):
        make_branch(trunk, config, 10)
    metrics = trunk.run_dir / METRICS
    metrics.write_text(metrics.read_text().replace('"step": 5', '"step": 4'))
    with pytest.raises(ConfigError, match="the rows up to step 15 are not those that the checkpoint"):
        make_branch(trunk, config, 15)
    assert not config.run_dir.exists()


def test_a_branch_whose_checkpoints_are_gone_does_not_start_over(trunk: RunConfig) -> None:
    config = branch_config(trunk, "b", LONGER)
    make_branch(trunk, config, 10)
    shutil.rmtree(config.run_dir / CHECKPOINTS)
    with pytest.raises(ConfigError, match=r"is a branch of .*, and none of its checkpoints is left"):
        check_config(config)
