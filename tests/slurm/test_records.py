import os
from pathlib import Path

import pytest

from slurm.records import ATTEMPTS, append, last_submission, read_attempts, saved_step, submissions


def row(job: int, attempt: int, following: str, task: int | None = None) -> dict[str, object]:
    return {"job": job, "task": task, "attempt": attempt, "next": following}


def test_the_last_row_of_an_attempt_counts(tmp_path: Path) -> None:
    assert read_attempts(tmp_path) == []
    for each in (row(7, 0, "running"), row(7, 0, "requeued"), row(7, 1, "running"), row(7, 0, "running", 2)):
        append(tmp_path, each)
    assert read_attempts(tmp_path) == [row(7, 0, "requeued"), row(7, 1, "running"), row(7, 0, "running", 2)]


def test_half_a_row_is_passed_over_and_spoils_no_other(tmp_path: Path) -> None:
    append(tmp_path, row(7, 0, "done"))
    with (tmp_path / ATTEMPTS).open("a") as file:
        file.write('{"job": 7, "att')
    assert read_attempts(tmp_path) == [row(7, 0, "done")]
    append(tmp_path, row(8, 0, "running"))
    assert read_attempts(tmp_path) == [row(7, 0, "done"), row(8, 0, "running")]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_disk_that_is_full_is_an_error(tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).symlink_to("/dev/full")
    with pytest.raises(OSError):
        append(tmp_path, row(7, 0, "done"))


def test_submissions_are_those_that_slurm_took_in_their_order(tmp_path: Path) -> None:
    assert last_submission(tmp_path) is None
    for name in ("1", "2", "10", "11", "lock"):
        (tmp_path / name).mkdir()
    for name in ("1", "2", "10"):
        (tmp_path / name / "job.json").write_text("{}")
    assert submissions(tmp_path) == [tmp_path / "1", tmp_path / "2", tmp_path / "10"]
    assert last_submission(tmp_path) == tmp_path / "10"


def test_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert saved_step(tmp_path) == 0
    for name in ("step_00000005", "step_00000012", "saving.step_00000020", "step_00000030.corrupt"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert saved_step(tmp_path) == 12
