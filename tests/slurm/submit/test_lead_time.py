import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import RunConfig
from slurm.profile import Profile
from slurm.submit import lead_time
from slurm.submit.lead_time import warning
from slurm.submit.run import submit
from tests.pretrain.tiny_data import write_tiny_data
from tests.slurm.run_directories import write_run


@pytest.fixture(autouse=True)
def kill_wait(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """KillWait, in a list to change."""
    said: list[Any] = [None]
    monkeypatch.setattr(lead_time, "kill_wait_s", lambda: said[0])
    return said


def profile(lead_s: int) -> Profile:
    return Profile(time_limit="1:00:00", tasks_per_node=1, signal_lead_s=lead_s)


def measured(tmp_path: Path, checkpoint_s: float | None = 3.0) -> RunConfig:
    """Steps of 1 s + 0.5 s, evaluations of 5 s, and checkpoints of `checkpoint_s` and less."""
    run = write_run(tmp_path, steps=10, record={"status": "running", "attempts": []})
    for step, seconds in ((5, checkpoint_s), (10, checkpoint_s and 1.0)):
        folder = run.run_dir / "checkpoints" / f"step_{step:08d}"
        folder.mkdir(parents=True)
        manifest = {} if seconds is None else {"seconds": seconds}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return run


def test_it_names_what_was_measured_and_a_value_to_set(tmp_path: Path) -> None:
    run = measured(tmp_path)
    # 60 + 2 x (1.5 + 5 + 3)
    assert warning(run, profile(79)) is None
    assert warning(run, profile(78)) == (
        "signal_lead_s = 78 may be too short to save before the time limit: earlier attempts took up to "
        "1.5 s a step, 5.0 s an evaluation and 3.0 s a checkpoint; 60 s + 2 x their sum is 79 s: set "
        "signal_lead_s = 80 in the profile"
    )


def test_a_kill_wait_that_is_too_short(tmp_path: Path, kill_wait: list[Any]) -> None:
    run = measured(tmp_path)
    kill_wait[0] = 5
    assert warning(run, profile(100)) is None
    kill_wait[0] = 4
    assert (warning(run, profile(100)) or "").startswith(
        "at scancel and preemption Slurm kills ranks after KillWait = 4 s"
    )
    assert len((warning(run, profile(10)) or "").splitlines()) == 2


def test_submit_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_data(tmp_path / "data")
    run, site = measured(tmp_path), tmp_path / "site.toml"
    site.write_text('time_limit = "10:00"\ntasks_per_node = 1\nsignal_lead_s = 70\n')
    assert submit(run.run_dir / "config.resolved.json", profile_path=site, dry_run=True) == 0
    shown = capsys.readouterr()
    assert "motley submit: warning: signal_lead_s = 70 may be too short" in shown.err
    assert shown.out.startswith("#!/bin/bash")


def test_nothing_measured_no_warning(tmp_path: Path, kill_wait: list[Any]) -> None:
    kill_wait[0] = 1
    assert warning(write_run(tmp_path / "new"), profile(1)) is None
    an_earlier_version_s = measured(tmp_path, checkpoint_s=None)
    assert "0.0 s a checkpoint" in (warning(an_earlier_version_s, profile(1)) or "")
