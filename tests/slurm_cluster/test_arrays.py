"""Arrays on a real cluster: a comparison's runs, of which some are killed, and tokenizing in parts."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.atomic import write_json
from data_pipeline.tokenize.prepare import tokenize
from parallel.launch import child_environment
from pretrain.comparison.config import make_plan
from pretrain.comparison.plan_file import write_plan
from pretrain.comparison.run import run_comparison
from slurm.records import read_attempts
from tests.data_pipeline.raw_documents import CONFIG, write_raw
from tests.data_pipeline.tokenize.test_prepare import contents
from tests.e2e.test_train_resume import curve, last_step
from tests.e2e.warm import train
from tests.pretrain.tiny_data import write_tiny_comparison
from tests.slurm_cluster.cluster import Cluster, environment_of
from tests.slurm_cluster.conftest import PROFILE, REPOSITORY, write_profile
from tests.slurm_cluster.running import is_pending, processes_with, wait_until
from tests.warm_python import executable

pytestmark = pytest.mark.xdist_group("cluster 1")
STEPS = 200


def motley(cluster: Cluster, *words: object, fresh: bool = False) -> "subprocess.CompletedProcess[str]":
    """`motley WORDS`. Its jobs are run by the same Python: one that starts `fresh`, or one that has all
    imported (tests/warm_python.py), whose processes cannot be stopped by SIGSTOP."""
    return subprocess.run(
        [sys.executable if fresh else executable(), "-m", "tools.cli", *map(str, words)],
        cwd=REPOSITORY,
        env=environment_of(cluster, child_environment(1)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def left_the_queue(cluster: Cluster, job: int, timeout_s: float = 300.0) -> dict[str, str]:
    ended = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
    return cluster.wait_for(job, lambda seen: seen.get("JobState") in ended, timeout_s)


def test_tokenizing_in_parts_gives_the_bytes_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    raw, whole, out = (tmp_path / name for name in ("raw", "whole", "out"))
    write_raw(raw / "train", shards=4)
    write_raw(raw / "heldout", shards=1, first=100)
    fitted = tmp_path / "fitted.toml"
    fitted.write_text(CONFIG)
    tokenize(raw, tmp_path / "first", config_path=fitted, processes=1, tokenizers_only=True)
    config = tmp_path / "data.toml"
    config.write_text(f'tokenizers_from = "{tmp_path / "first" / "tokenizers"}"\nmax_bad_frac = 0.0\n')
    tokenize(raw, whole, config_path=config, processes=1)

    words = (
        "tokenize",
        raw,
        out,
        "--config",
        config,
        "--profile",
        PROFILE,
        "--parts",
        3,
        "--concurrent-parts",
        2,
    )
    done = motley(cluster, *words)
    assert done.returncode == 0, done.stderr
    jobs = [int(line.split()[1][:-1]) for line in done.stdout.splitlines()[:3]]
    again = motley(cluster, *words)
    refused = again.returncode == 2 and any(word in again.stderr for word in ("scancel", "is writing it"))
    assert refused or "is done" in again.stdout
    ended = left_the_queue(cluster, jobs[-1])
    output = "\n".join(path.read_text() for path in sorted(out.glob("slurm/*.out")))
    assert ended["ExitCode"] == "0:0", output
    for k in (1, 2, 3):
        assert f"part {k} of 3 is written" in (out / "slurm" / f"job_{jobs[1]}_{k}.out").read_text()
    written = {name: text for name, text in contents(out).items() if not name.startswith("slurm/")}
    assert written == contents(whole)
    assert "is done" in motley(cluster, *words).stdout


@dataclass(frozen=True)
class Output:
    directory: Path

    def text(self) -> str:
        """All that jobs and ranks printed, for a message."""
        files = sorted([*self.directory.rglob("*.out"), *self.directory.rglob("*.log")])
        return "\n".join(f"== {file}\n{file.read_text()}" for file in files)


def element_rank(array: int, task: int) -> list[int]:
    """The process of the only rank of an array's element; its environment holds an id of its own."""
    return processes_with(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID=task, SLURM_PROCID=0)


def test_a_comparison_of_which_two_runs_are_killed_ends_as_one_never_interrupted(
    cluster: Cluster, data: Path, tmp_path: Path
) -> None:
    every = {"log": 5, "eval": STEPS // 2, "checkpoint": 1000}
    comparison = write_tiny_comparison(data, tmp_path, steps=STEPS, every_steps=every)
    directory = tmp_path / "runs" / "tiny_compare"
    profile = write_profile(tmp_path, nodes=1, tasks_per_node=1)
    words = ("submit", comparison, "--profile", profile)
    output = Output(directory)

    def submit() -> tuple[int, int]:
        done = motley(cluster, *words, fresh=True)
        assert done.returncode == 0, done.stderr
        job, report = (re.search(pattern, done.stdout) for pattern in (r"^job (\d+):", r"job (\d+) reports"))
        assert job is not None and report is not None, done.stdout
        return int(job[1]), int(report[1])

    # Both runs of seed 3 are ended: one is killed before it saved anything, one is cancelled and may save.
    array, report = submit()
    for task in (0, 1):  # they are held, because they might end while `motley submit` looks at them
        wait_until(lambda task=task: bool(element_rank(array, task)), output)
        for pid in element_rank(array, task):
            os.kill(pid, signal.SIGSTOP)
    told = motley(cluster, *words).stdout
    assert "nothing to submit" in told and f"job {array}_3: left alone" in told, told
    assert f"job {report} reports" in told
    cluster.run("scancel", f"{array}_1")
    for pid in element_rank(array, 0):
        os.kill(pid, signal.SIGKILL)
    assert left_the_queue(cluster, report)["ExitCode"] == "0:0", output.text()
    (killed,) = read_attempts(directory / "dense_seed3" / "slurm")
    assert (killed["job"], killed["task"], killed["next"]) == (array, 0, "stopped"), killed
    assert killed["cause"]["kind"] == "killed" and "no step was saved" in killed["reason"]
    interim = json.loads((directory / "report" / "summary.json").read_text())
    assert {name: end["kind"] for name, end in interim["run_ends"].items()} == {
        **{"dense_seed3": "unfinished", "mot_seed3": "unfinished"},
        **{"dense_seed4": "finished", "mot_seed4": "finished"},
    }, output.text()
    undisturbed = {name: curve(directory / name) for name in ("dense_seed4", "mot_seed4")}

    step_before = last_step(directory / "mot_seed3")
    # Only they are submitted again. One is told to stop (as ahead of its time limit) and requeues itself.
    array, report = submit()
    assert json.loads((directory / "slurm" / "2" / "elements.json").read_text()) == [
        str(directory / name / "slurm" / "2") for name in ("dense_seed3", "mot_seed3")
    ]
    wait_until(lambda: last_step(directory / "mot_seed3") >= step_before + 10, output)
    (rank,) = element_rank(array, 1)
    os.kill(rank, signal.SIGSTOP)  # it is held, because it might end before Slurm's signal comes
    cluster.run("scancel", "--signal=USR2", f"{array}_1")
    wait_until(lambda: is_pending(rank, signal.SIGUSR2), output)
    os.kill(rank, signal.SIGCONT)
    assert left_the_queue(cluster, report)["ExitCode"] == "0:0", output.text()
    first, second = [row for row in read_attempts(directory / "mot_seed3" / "slurm") if row["job"] == array]
    assert (first["task"], first["attempt"], first["exit_code"], first["next"]) == (1, 0, 85, "requeued"), (
        output.text()
    )
    assert (second["task"], second["attempt"], second["next"]) == (1, 1, "done"), output.text()
    assert 10 <= first["to_step"] == second["from_step"] < STEPS
    (other,) = [row for row in read_attempts(directory / "dense_seed3" / "slurm") if row["job"] == array]
    assert (other["task"], other["next"]) == (0, "done")
    for name, seen in undisturbed.items():
        assert curve(directory / name) == seen and len(read_attempts(directory / name / "slurm")) == 1

    # Nothing is missing: the report is made again where one stands.
    done = motley(cluster, *words)
    assert done.returncode == 0 and "Report: " in done.stderr and done.stdout == ""

    # One that was never interrupted, of which two runs are those that were not interrupted here.
    (tmp_path / "local").mkdir()
    reference = make_plan(write_tiny_comparison(data, tmp_path / "local", steps=STEPS, every_steps=every))
    write_plan(reference)
    for name in undisturbed:
        shutil.copytree(directory / name, reference.directory / name)
    for run in reference.runs:
        if run.name not in undisturbed:
            write_json(tmp_path / "local" / f"{run.name}.json", run.config.model_dump(mode="json"))
            train([str(tmp_path / "local" / f"{run.name}.json")], tmp_path / "local" / "out")
            assert curve(run.config.run_dir) == curve(directory / run.name)
    assert run_comparison(reference.path, report_only=True) == 0
    assert without_times(directory) == without_times(reference.directory)


def without_times(directory: Path) -> dict[str, Any]:
    """What a report says but for what follows from seconds, and from edits of the code while tests run."""
    report = directory / "report"
    summary = json.loads((report / "summary.json").read_text())
    for contrast in summary["contrasts"]:
        del contrast["step_matching"]["seconds"]
    del summary["step_time_ratio"]
    summary["systems"] = {arm: system["train_flops"] for arm, system in summary["systems"].items()}
    told = summary["caveats"]
    summary["caveats"] = [each for each in told if "versions of the code" not in each["text"]]
    return summary | {"final.csv": (report / "final.csv").read_text()}
