"""A comparison as an array, without a cluster: Slurm's commands are programs that note what they are told."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.atomic import write_json
from pretrain.comparison.config import make_plan
from slurm.submit.comparison import submit_comparison
from tests.pretrain.tiny_data import write_tiny_comparison, write_tiny_data
from tests.slurm.fake_slurm import FakeSlurm
from tools.cli import main

PROFILE = Path(__file__).parents[3] / "slurm" / "profiles" / "test_cluster.toml"


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    write_tiny_data(tmp_path)
    return write_tiny_comparison(tmp_path, tmp_path)


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    return FakeSlurm(tmp_path / "bin", monkeypatch)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def finish(run_dir: Path) -> None:
    """As a run that is done leaves its directory, as far as submitting looks at it."""
    config = read(next(run_dir.glob("slurm/*/config.json")))
    write_json(run_dir / "config.resolved.json", config)
    write_json(
        run_dir / "record.json",
        {"status": "done", "attempts": [{"to_step": 24, "stopped": "2026-01-31T12:09:10+00:00"}]},
    )


def refused(capsys: pytest.CaptureFixture[str], comparison: Path, *arguments: str) -> str:
    """The one message, with exit code 2."""
    capsys.readouterr()
    assert main(["submit", str(comparison), "--profile", str(PROFILE), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = re.findall(r"^motley submit: .*", captured.err, flags=re.MULTILINE | re.DOTALL)
    return message


def test_a_chain_is_not_dropped_in_silence(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "chain.toml"
    profile.write_text("chain = 3\n" + PROFILE.read_text().replace("max_requeues = 2", "max_requeues = 0"))
    assert main(["submit", str(comparison), "--profile", str(profile)]) == 0
    captured = capsys.readouterr()
    assert f"({profile}: chain = 3)" in captured.err and captured.out.startswith("job 17: 4 runs")


def test_all_runs_are_one_throttled_array_and_then_a_report(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["submit", str(comparison), "optimizer.learning_rate=1e-3", "--profile", str(PROFILE)]
    assert main([*words, "--nodes", "1"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("job 17: 4 runs of tiny_compare on 1 x 2 ranks each, 2 at a time\n")
    assert "job 18 reports: " in told and "motley cancel " in told
    directory = tmp_path / "runs" / "tiny_compare"
    owner = directory / "slurm" / "1"
    array, report = slurm.jobs
    assert (array["array"], array["nodes"], array["job-name"]) == ("0-3%2", "1", "tiny_compare")
    assert array["output"] == f"{directory}/slurm/job_%A_%a.out" and "dependency" not in array
    assert f"slurm.attempt {shlex.quote(str(owner))}" in slurm.script(17) and "--array=0-3%2" in slurm.script(
        17
    )
    assert (report["dependency"], report["job-name"]) == ("afterany:17", "tiny_compare-report")
    assert (report["nodes"], report["ntasks-per-node"]) == ("1", "1")
    command = f"compare {shlex.quote(str(comparison))} optimizer.learning_rate=1e-3 --report-only"
    assert command in slurm.script(18)

    names = [f"{arm}_seed{seed}" for seed in (3, 4) for arm in ("dense", "mot")]
    elements = [directory / name / "slurm" / "1" for name in names]
    assert read(owner / "elements.json") == [str(element) for element in elements]
    for task, (name, element) in enumerate(zip(names, elements, strict=True)):
        job = read(element / "job.json")
        assert job | {"submitted": ""} == {
            **{"job": 17, "task": task, "chain": [], "name": "tiny_compare", "submitted": ""}
        }
        config = read(element / "config.json")
        assert (config["name"], config["optimizer"]["learning_rate"]) == (name, 1e-3)
        assert read(element / "profile.json") == read(owner / "profile.json")
    assert read(owner / "job.json")["report_job"] == 18 and (owner / "code.json").exists()
    # As `motley compare` writes it: the one goes on with what the other began.
    assert list(read(directory / "comparison.json")["runs"]) == names
    plan = make_plan(comparison, ["optimizer.learning_rate=1e-3"])
    assert read(directory / "comparison.json")["comparison"] == plan.config.model_dump(mode="json")


def test_only_what_is_missing_is_submitted_again(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_comparison(comparison, profile_path=PROFILE, concurrent_runs=4)
    directory = tmp_path / "runs" / "tiny_compare"
    finish(directory / "dense_seed3")
    # One of three runs that are not done is running, the others are gone; the report's job waits still.
    slurm.queue(_17_2="RUNNING tiny_compare", _17_1="RUNNING another", _18="PENDING tiny_compare-report")
    capsys.readouterr()
    submit_comparison(comparison, profile_path=PROFILE, concurrent_runs=3)
    told = capsys.readouterr().out
    assert told.startswith("job 19: 2 runs of tiny_compare on 2 x 2 ranks each, 3 at a time\n")
    assert "done      1 of 4 runs" in told and "running   dense_seed4, job 17_2" in told
    array, report = slurm.jobs[2:]
    assert array["array"] == "0-1%3" and report["dependency"] == "afterany:17_2:19"
    again = [str(directory / name / "slurm" / "2") for name in ("mot_seed3", "mot_seed4")]
    assert read(directory / "slurm" / "2" / "elements.json") == again
    assert slurm.cancelled == ["18"]  # it would have reported without them

    # All that is missing is in the queue, and so is the job that reports: nothing is submitted.
    queue = {
        "_17_2": "RUNNING tiny_compare",
        "_19_0": "PENDING tiny_compare",
        "_19_1": "PENDING tiny_compare",
    }
    slurm.queue(**queue, _20="PENDING tiny_compare-report")
    capsys.readouterr()
    assert submit_comparison(comparison, profile_path=PROFILE) == 0
    told = capsys.readouterr().out
    assert told.startswith("tiny_compare: nothing to submit\n") and "job 20 reports" in told
    assert len(slurm.jobs) == 4 and not (directory / "slurm" / "3").exists()

    slurm.queue(**queue)  # somebody cancelled the report
    assert submit_comparison(comparison, profile_path=PROFILE) == 0
    assert slurm.jobs[4]["dependency"] == "afterany:19_0:17_2:19_1"
    assert read(directory / "slurm" / "3" / "job.json")["job"] is None


def test_a_finished_comparison_is_reported_on_the_spot(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    submit_comparison(comparison, profile_path=PROFILE)
    for run in (tmp_path / "runs" / "tiny_compare").glob("*_seed*"):
        finish(run)
    # They hold no metrics here, which the report says: it was asked for.
    assert "nothing to report on" in refused(capsys, comparison) and len(slurm.jobs) == 2


@pytest.mark.parametrize("accepted", [0, 1])
def test_what_sbatch_refuses_leaves_nothing_behind(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str], accepted: int
) -> None:
    slurm.accept(accepted)
    assert "sbatch refused the job: sbatch: error: no more" in refused(capsys, comparison)
    assert slurm.cancelled == ["17"][:accepted]
    directory = tmp_path / "runs" / "tiny_compare"
    assert not list(directory.rglob("slurm/[0-9]*")) and not (directory / "comparison.json").exists()
    slurm.accept(2)
    assert submit_comparison(comparison, profile_path=PROFILE) == 0


def test_every_run_is_checked_before_anything_is_written(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    six = refused(capsys, comparison, "--nodes", "3")
    assert re.search(r'arms."dense", with .+: 3 x 2 ranks: .* cannot be split over dp = 6', six)
    assert "no such folder" in refused(capsys, comparison, 'data.heldout="nowhere"')
    # What `motley compare` would start on this machine does not matter here.
    assert (
        main(
            [
                "submit",
                str(comparison),
                "--profile",
                str(PROFILE),
                "--dry-run",
                "comparison.processes_per_run=3",
            ]
        )
        == 0
    )
    assert not (tmp_path / "runs").exists() and not slurm.jobs


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.remove()
    assert (
        main(["submit", str(comparison), "--profile", str(PROFILE), "--concurrent-runs", "3", "--dry-run"])
        == 0
    )
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=tiny_compare\n") and "--array=0-3%3\n" in out
    assert not (tmp_path / "runs").exists()
    assert "sbatch is not on the PATH" in refused(capsys, comparison)


def test_it_waits_for_the_report(
    comparison: Path, tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit_comparison(comparison, profile_path=PROFILE, wait=True, poll_s=0.01) == 1
    assert "0 of 4 runs are done\n  unfinished: dense_seed3\n" in capsys.readouterr().out
