"""Changes of a run are whole or unmade, wherever the process that makes them is killed."""

import json
import shutil
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import load
from pretrain.lineage.changes import (
    as_extended,
    change_of,
    finish_change,
    has_later,
    make_change,
    saved_steps,
)
from pretrain.metrics import read_rows
from pretrain.run_dir import check_config, finished_step, read_record
from pretrain.run_files import CHECKPOINTS, METRICS, RECORD
from pretrain.run_identity import identity_of
from tests.pretrain.lineage.made_run import files_of, killed_at, make_run, run_config


def extend_from_10(run_dir: Path) -> None:
    """The change that an extension of `old` from step 10 makes."""
    finish_change(run_dir)
    old = as_extended(run_config(run_dir.parent))
    new = run_config(run_dir.parent, steps=30)
    if old != new:
        make_change(run_dir, change_of("extend", run_dir, step=10, old=old, new=new))


def test_a_change_sets_later_steps_aside_and_keeps_what_the_run_was(tmp_path: Path) -> None:
    old = run_config(tmp_path, keep_checkpoints=2)
    run_dir = make_run(old, [5, 10, 15, 20], spikes=[7, 17])
    before = identity_of(read_record(run_dir))
    extend_from_10(run_dir)
    assert saved_steps(run_dir) == [5, 10] and not has_later(run_dir, 10)
    assert [row["step"] for row in read_rows(run_dir / METRICS)] == [5, 10]
    aside = run_dir / CHECKPOINTS / "aside_1"
    assert sorted(path.name for path in aside.iterdir()) == [METRICS, "step_00000015", "step_00000020"]
    assert [row["step"] for row in read_rows(aside / METRICS)] == [15, 20]
    after, record = identity_of(read_record(run_dir)), read_record(run_dir)
    assert before is not None and after is not None
    assert (after.id, after.earlier_configs) == (before.id, (before.config_sha256,))
    assert after.config_sha256 != before.config_sha256
    assert "metrics" not in record and record["status"] == "stopped"
    assert record["changes"][0]["before"] == {"total_tokens": 2560}
    spikes = record["spikes"]
    assert [event["step"] for event in spikes["events"]] == [7] and spikes["train/lost_steps"] == 1
    assert finished_step(run_config(tmp_path, steps=30)) is None
    check_config(run_config(tmp_path, steps=30))

    make_change(run_dir, change_of("go back", run_dir, step=5))
    assert saved_steps(run_dir) == [5] and (run_dir / CHECKPOINTS / "aside_2/step_00000010").is_dir()
    assert "spikes" not in read_record(run_dir)


def test_a_process_killed_anywhere_in_a_change_leaves_one_that_is_finished(tmp_path: Path) -> None:
    made = make_run(run_config(tmp_path / "made"), [5, 10, 15, 20])
    whole = Path(shutil.copytree(made, tmp_path / "whole/tiny"))
    extend_from_10(whole)
    moment, was_killed = 0, True
    while was_killed:
        moment += 1
        run_dir = Path(shutil.copytree(made, tmp_path / f"{moment}/tiny"))
        was_killed = killed_at(moment, lambda run_dir=run_dir: extend_from_10(run_dir))
        extend_from_10(run_dir)  # the same command
        assert files_of(run_dir) == files_of(whole), moment
        check_config(as_extended(run_config(run_dir.parent)))
    assert moment > 5


def test_the_file_of_an_extended_run_means_the_extended_run(tmp_path: Path) -> None:
    run_dir = make_run(run_config(tmp_path), [10])
    extend_from_10(run_dir)
    new = run_config(tmp_path, steps=30)
    assert as_extended(run_config(tmp_path)) == as_extended(new) == new == load(run_dir)
    assert as_extended(run_config(tmp_path, keep_checkpoints=7)).keep_checkpoints == 7
    other = run_config(tmp_path, steps=25)
    assert as_extended(other) == other
    with pytest.raises(ConfigError, match="total_tokens: 3840 there, 3200 now"):
        check_config(other)


def test_a_run_does_not_go_back_to_a_damaged_checkpoint(tmp_path: Path) -> None:
    run_dir = make_run(run_config(tmp_path), [5, 10])
    (run_dir / CHECKPOINTS / "step_00000005/state.json").write_text("{}")
    with pytest.raises(ConfigError, match="step_00000005 is damaged, so nothing goes on from there: state"):
        change_of("go back", run_dir, step=5)


def test_a_damaged_change_is_named(tmp_path: Path) -> None:
    run_dir = make_run(run_config(tmp_path), [10])
    record = json.loads((run_dir / RECORD).read_text())
    (run_dir / RECORD).write_text(json.dumps(record | {"changes": [{"kind": "extend"}]}))
    with pytest.raises(ConfigError, match=r"changes\[0\]: before: required, but missing"):
        as_extended(run_config(tmp_path))
