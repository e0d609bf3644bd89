"""Files of another run are refused by name; those of earlier versions have no identity."""

from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.run_files import CONFIG
from pretrain.run_identity import (
    RECORD_FORMAT,
    RunIdentity,
    check_files_are_there,
    check_origin,
    draw_identity,
    identity_of,
)

OURS = RunIdentity("ab12", "c0ffee")
OLDER = RunIdentity("ab12", "c0ffee", began_without=True)


def test_a_record_keeps_the_identity_and_whether_the_run_began_without(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text("{}")
    drawn = draw_identity(tmp_path)
    assert identity_of({"format": RECORD_FORMAT, "run": drawn.to_json()}) == drawn
    older = identity_of({"format": 1, "run": drawn.to_json()})
    assert older is not None and older.began_without
    assert identity_of({"format": 1}) is None and identity_of({}) is None
    assert draw_identity(tmp_path).id != drawn.id
    assert draw_identity(tmp_path).config_sha256 == drawn.config_sha256


@pytest.mark.parametrize(
    ("saved", "problem"),
    [
        ({"id": "cd34", "config_sha256": "c0ffee"}, "its run id is cd34, and this run has ab12"),
        ({"id": "ab12", "config_sha256": "bad"}, r"saved under another config\.resolved\.json"),
        (None, "it names no run, as all checkpoints of this run do"),
    ],
)
def test_a_foreign_checkpoint_is_named(saved: dict[str, str] | None, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"step_00000003 is a checkpoint of another run: .*{problem}"):
        check_origin(Path("step_00000003"), saved, OURS)


def test_the_runs_own_checkpoints_are_taken_and_those_of_earlier_versions_where_they_may_be() -> None:
    for run in (OURS, OLDER):
        check_origin(Path("step_00000003"), run.to_json(), run)
    check_origin(Path("step_00000003"), None, OLDER)


def test_a_checkpoint_alone_shows_that_files_are_missing(tmp_path: Path) -> None:
    check_files_are_there(tmp_path)
    check_files_are_there(tmp_path / "absent")
    (tmp_path / "checkpoints" / "saving.step_00000005").mkdir(parents=True)
    (tmp_path / "slurm").mkdir()
    check_files_are_there(tmp_path)
    (tmp_path / "checkpoints" / "step_00000005").mkdir()
    with pytest.raises(ConfigError, match=rf"{CONFIG} is missing, and checkpoints/step_00000005 is there"):
        check_files_are_there(tmp_path)
