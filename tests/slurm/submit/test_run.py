"""What of submitting needs no cluster: Slurm's commands are programs that say what a case wants."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pretrain.config import load
from pretrain.run_dir import CodeState, RunDir
from slurm.records import read_attempts
from slurm.submit import run as module
from slurm.submit.run import submit
from tests.pretrain.lineage.made_run import make_run
from tests.pretrain.tiny_data import tiny_run, write_tiny_data
from tests.toml_text import toml_text
from tools.cli import main

PROFILE = Path(__file__).parents[3] / "slurm" / "profiles" / "test_cluster.toml"
Install = Callable[..., None]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    write_tiny_data(tmp_path)
    values = tiny_run(tmp_path, tmp_path / "runs")
    values["parallel"]["micro_batch_sequences"] = 1
    path = tmp_path / "tiny.toml"
    path.write_text(toml_text(values))
    return path


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes sbatch and squeue of these bash lines the only ones there are."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")

    def make(*, sbatch: str = "echo 17", squeue: str = ":", scancel: str = ":") -> None:
        for name, text in {"sbatch": sbatch, "squeue": squeue, "scancel": scancel}.items():
            (commands / name).write_text(f"#!/bin/bash\n{text}\n")
            (commands / name).chmod(0o755)

    return make


def test_what_was_submitted_is_kept(
    run_file: Path,
    tmp_path: Path,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    keep = f'cp "${{@: -1}}" "{tmp_path}/seen"; printf "%s\\n" "$@" >"{tmp_path}/words"'
    install(sbatch=f"{keep}; echo '17;cluster'")
    assert submit(run_file, ["seed=9"], profile_path=PROFILE, nodes=1) == 0
    out = capsys.readouterr().out
    run_dir = tmp_path / "runs" / "tiny"
    assert out.startswith("job 17: tiny on 1 x 2 ranks, 10:00 an attempt, 2 requeues at most\n")
    assert f"{run_dir}/slurm/job_17.out" in out and "motley cancel " in out
    kept = run_dir / "slurm" / "1"
    assert (kept / "job.sbatch").read_text() == (tmp_path / "seen").read_text()
    words = (tmp_path / "words").read_text().splitlines()
    script = (tmp_path / "seen").read_text()
    header = [
        shlex.split(line.removeprefix("#SBATCH "))
        for line in script.splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert words[0] == "--parsable" and header[: len(words) - 2] == [[word] for word in words[1:-1]]
    assert load(kept / "config.json") == load(run_file, ["seed=9"])
    assert f"-m slurm.attempt {shlex.quote(str(kept))} " in (kept / "job.sbatch").read_text()
    assert json.loads((kept / "profile.json").read_text())["nodes"] == 1
    job = json.loads((kept / "job.json").read_text())
    assert job | {"submitted": 0} == {
        **{"job": 17, "task": None, "chain": [], "name": "tiny", "submitted": 0}
    }
    here = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    if head.returncode == 0:
        code = json.loads((kept / "code.json").read_text())
        assert code["commit"] == head.stdout.strip()
        assert code.keys() == {"commit", "diff", "changed_files"}
    assert not (kept / "code.diff").exists()  # it may hold secrets

    # Once the job is gone the run may be submitted again, beside what was kept of the first.
    monkeypatch.setattr("slurm.submit.run.code_state", lambda: CodeState("c0de", "+key", ["a.py"]))
    assert submit(run_file, ["seed=9", "keep_code_diff=true"], profile_path=PROFILE) == 0
    assert json.loads((run_dir / "slurm" / "2" / "profile.json").read_text())["nodes"] == 2
    assert (run_dir / "slurm" / "2" / "code.diff").read_text() == "+key"


def test_a_dry_run_needs_no_slurm_and_writes_nothing(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", str(run_file), "--profile", str(PROFILE), "--dry-run", "name=dry"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=dry\n") and out.endswith("\n")
    assert not (tmp_path / "runs").exists()


def refused(
    run_file: Path, capsys: pytest.CaptureFixture[str], *arguments: str, profile: Path = PROFILE
) -> str:
    """The one message, with exit code 2."""
    assert main(["submit", str(run_file), "--profile", str(profile), *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (message,) = re.findall(r"^motley submit: .*", captured.err, flags=re.MULTILINE | re.DOTALL)
    return message


def test_no_slurm(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refused(run_file, capsys)
    assert "sbatch is not on the PATH" in message and "motley train" in message
    assert not (tmp_path / "runs").exists()


def test_a_queued_run_is_not_submitted_twice(
    run_file: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(squeue="echo PENDING tiny")
    submit(run_file, profile_path=PROFILE)
    capsys.readouterr()
    message = refused(run_file, capsys)
    assert "has job 17, which is PENDING" in message and "motley cancel " in message and "name=..." in message

    install(squeue="echo RUNNING another")  # Slurm gave the id to somebody else
    assert submit(run_file, profile_path=PROFILE) == 0
    capsys.readouterr()
    install(squeue="echo slurm_load_jobs error: Unable to contact slurm controller >&2; exit 1")
    assert "does not say whether job 17 is queued: slurm_load_jobs error" in refused(run_file, capsys)
    install(squeue="echo slurm_load_jobs error: Invalid job id specified >&2; exit 1")  # long forgotten
    assert submit(run_file, profile_path=PROFILE) == 0


def test_what_sbatch_refuses_leaves_nothing_behind(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(sbatch="echo 'sbatch: error: invalid partition specified: debug' >&2; exit 1")
    message = refused(run_file, capsys)
    assert "sbatch refused the job: sbatch: error: invalid partition specified: debug" in message
    assert not list((tmp_path / "runs" / "tiny" / "slurm").glob("[0-9]*"))


def test_run_layout_and_profile_are_checked_before(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(sbatch=f"touch '{tmp_path}'/called; echo 17")
    assert "parallel.tp = 3 does not divide" in refused(run_file, capsys, "parallel.tp=3")
    assert "4 sequences per step cannot be split over dp = 6" in refused(run_file, capsys, "--nodes", "3")
    assert "no such folder" in refused(run_file, capsys, 'data.heldout="nowhere"')
    assert "nowhere.toml: no such file" in refused(run_file, capsys, profile=tmp_path / "nowhere.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text(PROFILE.read_text().replace("partition", "patrition"))
    assert 'bad.toml: patrition: unknown key; did you mean "partition"?' in refused(
        run_file, capsys, profile=bad
    )
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(run_file, capsys, f"runs_dir={tmp_path}/file")
    assert not (tmp_path / "called").exists()
    assert not (tmp_path / "runs").exists()


def test_another_config_and_a_run_in_use_are_refused(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    child = os.fork()
    if child == 0:  # the lock of a run directory is a process's
        _held = RunDir.open(load(run_file), world_size=1, command=["test"])
        os.kill(os.getpid(), 19)
    os.waitpid(child, os.WUNTRACED)
    try:
        assert f"is in use by pid {child}" in refused(run_file, capsys)
        assert "was made by another config" in refused(run_file, capsys, "seed=8")
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
    assert submit(run_file, profile_path=PROFILE) == 0


COUNT = """
echo "$*" >>"$(dirname "$0")"/words
echo $((16 + $(wc -l <"$(dirname "$0")"/words)))"""


def test_a_run_is_extended_and_branched_where_it_is_submitted(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install()
    config = load(run_file, ["optimizer.schedule.kind=constant"])
    run_dir = make_run(config, [20, 24])
    longer = ["--profile", str(PROFILE), f"total_tokens={2 * config.total_tokens}"]
    assert main(["submit", str(run_dir), "--extend", "--dry-run", *longer]) == 2
    assert "--dry-run writes nothing, and --extend, --branch and" in capsys.readouterr().err
    assert main(["submit", str(run_dir), "--branch", "b", "--from-step", "20", *longer]) == 0
    assert capsys.readouterr().out.startswith(f"{run_dir.parent / 'b'}: a branch of {run_dir} (run ")
    submitted = load(run_dir.parent / "b/slurm/1/config.json")
    assert submitted == load(run_dir.parent / "b") and submitted.num_steps == 48
    assert main(["submit", str(run_file), "optimizer.schedule.kind=constant", "--extend", *longer]) == 0
    assert "extended from 24 to 48 steps; goes on after step 24" in capsys.readouterr().out
    assert load(run_dir / "slurm/1/config.json").num_steps == load(run_dir).num_steps == 48
    (tmp_path / "compare.toml").write_text("arms = {}")
    assert main(["submit", str(tmp_path / "compare.toml"), "--extend", *longer]) == 2
    assert "are for runs; " in capsys.readouterr().err


def test_a_chain_is_jobs_that_wait_for_each_other(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "chain.toml"
    profile.write_text("chain = 3\n" + PROFILE.read_text().replace("max_requeues = 2", "max_requeues = 0"))
    install(sbatch=COUNT)
    assert submit(run_file, profile_path=profile) == 0
    out = capsys.readouterr().out
    assert out.startswith("job 17: tiny on 2 x 2 ranks, 10:00 an attempt, then 18, 19 until it is done\n")
    assert "squeue -j 17,18,19" in out
    job = json.loads((tmp_path / "runs" / "tiny" / "slurm" / "1" / "job.json").read_text())
    assert (job["job"], job["chain"]) == (17, [18, 19])
    first, second, third = (tmp_path / "bin" / "words").read_text().splitlines()
    assert "--dependency" not in first and "--no-requeue" in first
    assert "--dependency=afterany:17 --kill-on-invalid-dep=yes" in second
    assert "--dependency=afterany:18 " in third

    # Another is submitted only once all of them are gone.
    install(sbatch=COUNT, squeue="case $* in *--jobs=19*) echo PENDING tiny ;; esac")
    assert "has job 19, which is PENDING" in refused(run_file, capsys, profile=profile)


def test_what_was_submitted_of_a_chain_goes_where_slurm_takes_no_more(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = tmp_path / "chain.toml"
    profile.write_text("chain = 3\n" + PROFILE.read_text().replace("max_requeues = 2", "max_requeues = 0"))
    full = f'{COUNT}\n[ $(wc -l <"$(dirname "$0")"/words) -lt 3 ] || {{ echo too many >&2; exit 1; }}'
    install(sbatch=full, scancel='echo "$*" >"$(dirname "$0")"/cancelled')
    assert "sbatch refused the job: too many" in refused(run_file, capsys, profile=profile)
    assert (tmp_path / "bin" / "cancelled").read_text() == "17 18\n"
    assert not list((tmp_path / "runs" / "tiny" / "slurm").glob("[0-9]*"))


def test_fewer_nodes_must_be_legal_too_and_those_between_are_told(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    install(sbatch=f'echo "$*" >"{tmp_path}/words"; echo 17')
    profile = tmp_path / "elastic.toml"
    text = "min_nodes = 1\n" + PROFILE.read_text().replace("tasks_per_node = 2", "tasks_per_node = 1")
    profile.write_text(text.replace("\nnodes = 2", "\nnodes = 4"))
    assert submit(run_file, profile_path=profile) == 0
    assert "--nodes=1-4 " in (tmp_path / "words").read_text()
    out = capsys.readouterr().out
    assert "tiny on 1-4 x 1 ranks" in out
    assert "nodes     the layout is legal on 1, 2, 4; of 3 some stay idle" in out
    profile.write_text(profile.read_text().replace("min_nodes = 1", "min_nodes = 3"))
    assert "min_nodes = 3: " in refused(run_file, capsys, profile=profile)


def attempt(job: int, number: int, following: str, code: int | None) -> dict[str, Any]:
    row = {"job": job, "task": None, "attempt": number, "next": following, "exit_code": code}
    return row | {"reason": f"why {number}"}


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        ([attempt(17, 0, "requeued", 85), attempt(17, 1, "done", 0)], 0),
        ([attempt(17, 0, "requeued", 85), attempt(17, 1, "stopped", 9)], 9),
        ([attempt(17, 0, "ended", 85)], 85),
        ([attempt(17, 0, "running", None)], 1),
        ([attempt(17, 0, "requeued", 85)], 1),  # cancelled while it was queued again
        ([attempt(16, 0, "done", 0)], 1),  # another job's
    ],
)
def test_wait_ends_with_the_code_of_the_last_attempt(
    run_file: Path,
    tmp_path: Path,
    install: Install,
    capsys: pytest.CaptureFixture[str],
    rows: list[dict[str, Any]],
    code: int,
) -> None:
    recorded = tmp_path / "recorded"
    recorded.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    attempts = tmp_path / "runs" / "tiny" / "slurm" / "attempts.jsonl"
    # In the queue at the first look, gone at the second, when the job has recorded how it ended.
    there, written = shlex.quote(str(attempts)), shlex.quote(str(recorded))
    install(squeue=f"if [ -e {there} ]; then exit; fi; cp {written} {there}; echo RUNNING tiny")
    assert submit(run_file, profile_path=PROFILE, wait=True, poll_s=0.01) == code
    out = capsys.readouterr().out
    for row in rows:
        line = f"job 17, attempt {row['attempt']}: {row['next']}: {row['reason']}\n"
        assert out.count(line) == (row["job"] == 17 and row["next"] != "running")
    assert read_attempts(attempts.parent) == rows


def test_a_second_submit_at_the_same_moment_is_kept_out(
    run_file: Path, tmp_path: Path, install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "runs" / "tiny" / "slurm"
    install()
    child = os.fork()
    if child == 0:
        with module.lock_submission(folder):
            os.kill(os.getpid(), 19)
    os.waitpid(child, os.WUNTRACED)
    try:
        assert "another `motley submit` is working on it" in refused(run_file, capsys)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
