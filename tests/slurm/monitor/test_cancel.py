import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from pretrain.comparison.config import make_plan
from pretrain.comparison.plan_file import write_plan
from slurm.commands import Queued
from slurm.monitor import cancel as module
from slurm.monitor.cancel import cancel_jobs
from tests.pretrain.conftest import comparison_files  # noqa: F401
from tests.slurm.run_directories import write_run


class Slurm:
    def __init__(self) -> None:
        self.listed: dict[str, Queued] = {}
        self.cancelled: list[str] = []

    def add(self, job: str, name: str, state: str) -> None:
        self.listed[job] = Queued(state, "None", "N/A", name)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Slurm:
    slurm = Slurm()

    def in_queue(names: Sequence[str]) -> dict[str, Queued]:
        return {name: slurm.listed[name] for name in names if name in slurm.listed}

    monkeypatch.setattr(module, "in_queue", in_queue)
    monkeypatch.setattr(module, "cancel", slurm.cancelled.extend)
    monkeypatch.setattr(module, "kill_wait_s", lambda: 30)
    return slurm


def test_a_run_and_its_chain(tmp_path: Path, slurm: Slurm, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, job={"chain": [813, 814]})
    assert cancel_jobs(run.run_dir) == 0
    assert capsys.readouterr().out == f"{run.run_dir}: nothing queued or running\n"
    slurm.add("812", "tiny", "RUNNING")
    slurm.add("813", "tiny", "PENDING")
    slurm.add("814", "theirs", "PENDING")
    assert cancel_jobs(run.run_dir) == 0
    assert slurm.cancelled == ["813", "812"]  # 813 would begin when 812 ends
    assert capsys.readouterr().out.splitlines() == [
        "cancelling job 813: tiny, PENDING",
        "cancelling job 812: tiny, RUNNING",
        "ranks that are running save and stop, for which Slurm gives them 30 s (KillWait)",
        "the same `motley submit` goes on from the last step that was saved",
    ]


def test_a_comparison_s_elements_and_its_report(
    comparison_files: Callable[..., Any],  # noqa: F811
    slurm: Slurm,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan = make_plan(comparison_files().comparison, ["comparison.seeds=[1]"])
    write_plan(plan)
    for task, run in enumerate(plan.runs):
        write_run(plan.directory, name=run.name, job={"task": task})
        slurm.add(f"812_{task}", "dense_vs_mot", "PENDING")
    owner = plan.directory / "slurm" / "1"
    owner.mkdir(parents=True)
    (owner / "job.json").write_text(json.dumps({"job": 812, "report_job": 813}))
    slurm.add("813", "dense_vs_mot-report", "PENDING")
    assert cancel_jobs(plan.directory) == 0
    assert slurm.cancelled == ["813", "812_0", "812_1"]
    told = capsys.readouterr().out
    assert "job 812_1: mot_seed1, PENDING" in told and "KillWait" not in told
