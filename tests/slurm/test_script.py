"""Batch scripts as text, and what they do with the ends that srun reports: bash runs them, between a srun and
a scontrol that say what a case wants. `python -m tests.slurm.test_script` writes the golden files anew."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.toml_config import validate
from pretrain.train import USER_ERROR
from slurm.profile import Profile, load_profile
from slurm.script import USER_ERROR_CODE, render

PROFILES = sorted((Path(__file__).parents[2] / "slurm" / "profiles").glob("*.toml"))
GOLDEN = Path(__file__).parent / "golden"


def golden_text(profile: Path) -> str:
    run_dir = Path("/shared/runs/mot_7b")
    return render(
        load_profile(profile),
        name="mot_7b",
        run_dir=run_dir,
        config=run_dir / "slurm" / "1" / "config.json",
        folder=Path("/shared/motley"),
        python="/shared/motley/.venv/bin/python",
    )


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_golden(profile: Path) -> None:
    text = golden_text(profile)
    assert text == (GOLDEN / f"{profile.stem}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def rendered(folder: Path, **changes: Any) -> str:
    values: dict[str, Any] = {"tasks_per_node": 2, "nodes": 2, "time_limit": "1:00:00", "max_requeues": 2}
    return render(
        validate(Profile, values | changes, source="test"),
        name="tiny",
        run_dir=folder / "runs" / "tiny",
        config=folder / "config.json",
        folder=folder,
        python="python3",
    )


def test_what_a_person_wrote_is_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "it's 100% mine"
    text = rendered(folder, env={"A": "x'; touch pwned; '"}, options={"comment": "two words", "hold": True})
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    header = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    assert "#SBATCH --comment='two words'" in header and "#SBATCH --hold" in header
    chdir, output = (next(line for line in header if f"--{name}=" in line) for name in ("chdir", "output"))
    assert shlex.split(chdir)[1] == f"--chdir={folder}"
    # % is sbatch's own there
    assert "100%% mine/runs/tiny/slurm/job_%j.out" in output
    export = next(line for line in text.splitlines() if line.startswith("export A="))
    shown = subprocess.run(["bash", "-c", f'{export}; printf %s "$A"'], capture_output=True, text=True)
    assert shown.stdout == "x'; touch pwned; '"


def test_the_code_of_a_users_mistake_is_the_trainers() -> None:
    assert USER_ERROR_CODE == USER_ERROR


def ended(rank: int, how: str) -> str:
    return f"srun: error: node{rank // 2 + 1}: task {rank}: {how}"


def run_script(
    folder: Path,
    *,
    srun_says: str = "",
    srun_code: int = 0,
    saves: int = 0,
    attempt: int = 0,
    state: str = "RUNNING Reason=None",
    requeue_refused: bool = False,
    **profile: Any,
) -> tuple[int, dict[str, Any], list[str]]:
    """(exit code of the script, the last record, arguments of each scontrol and srun call)."""
    run_dir, commands = folder / "runs" / "tiny", folder / "bin"
    for path in (run_dir / "slurm", run_dir / "checkpoints" / "step_00000008", commands):
        path.mkdir(parents=True, exist_ok=True)
    calls = folder / "calls"
    log = f'echo "${{0##*/}} $* at $MASTER_ADDR:$MASTER_PORT" >>{calls}'
    saved = f"mkdir -p {run_dir}/checkpoints/step_{saves:08d}" if saves else ":"
    programs = {
        "srun": f"{log}\n{saved}\necho {shlex.quote(srun_says)} >&2\nexit {srun_code}",
        "scontrol": f"""{log}
case "$*" in
  'show hostnames '*) printf 'node1\\nnode2\\n' ;;
  *'show job '*) echo 'JobId=7 JobName=tiny JobState={state} Dependency=(null)' ;;
  'requeue '*) {"echo no >&2; exit 1" if requeue_refused else ":"} ;;
esac""",
    }
    for name, text in programs.items():
        (commands / name).write_text(f"#!/bin/bash\n{text}\n")
        (commands / name).chmod(0o755)
    script = folder / "job.sbatch"
    script.write_text(rendered(folder, **profile))
    done = subprocess.run(
        ["bash", str(script)],
        env={
            "PATH": f"{commands}:{os.environ['PATH']}",
            "RANK": "5",
            "SLURM_JOB_ID": "30007",
            "SLURM_JOB_NODELIST": "node[1-2]",
        }
        | ({"SLURM_RESTART_COUNT": str(attempt)} if attempt else {}),
        capture_output=True,
        text=True,
        timeout=60,
    )
    records = (run_dir / "slurm" / "attempts.jsonl").read_text().splitlines()
    record = json.loads(records[-1])
    assert record["reason"] in done.stdout
    return done.returncode, record, calls.read_text().splitlines() if calls.exists() else []


def test_ranks_meet_at_the_first_node_and_no_shell_is_between(tmp_path: Path) -> None:
    code, record, calls = run_script(tmp_path, saves=20)
    assert (code, record["next"], record["from_step"], record["to_step"]) == (0, "done", 8, 20)
    (srun,) = (call for call in calls if call.startswith("srun "))
    logs = tmp_path / "runs" / "tiny" / "logs" / "job_30007_attempt_0"
    assert srun == (
        "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --cpus-per-task=1 --kill-on-bad-exit=1 --wait=60 "
        f"--output={logs}/rank%t.log --open-mode=append python3 -m pretrain.train {tmp_path}/config.json "
        "at node1:15007"
    )


STOPPED: dict[str, Any] = {
    "srun_says": "\n".join(ended(rank, "Exited with exit code 85") for rank in range(4)),
    "srun_code": 85,
}
FAILED_FIRST: dict[str, Any] = {
    "srun_says": "\n".join(
        [ended(3, "Exited with exit code 9"), *(ended(rank, "Terminated") for rank in range(3))]
    ),
    "srun_code": 143,
}


@pytest.mark.parametrize(
    ("case", "code", "following", "reason"),
    [
        (STOPPED | {"saves": 12}, 85, "requeued", "by a signal, after a checkpoint"),
        (STOPPED, 85, "stopped", "no step was saved in this attempt"),
        (STOPPED | {"saves": 12, "attempt": 1}, 85, "requeued", "requeue 2 of 2"),
        (STOPPED | {"saves": 12, "attempt": 2}, 85, "stopped", "cap of 2 requeues"),
        (STOPPED | {"saves": 12, "max_requeues": 0}, 85, "stopped", "cap of 0"),
        (
            STOPPED | {"saves": 12, "state": "COMPLETING Reason=TimeLimit"},
            *(85, "requeued", "the time limit; stopped by a signal"),
        ),
        (
            STOPPED | {"saves": 12, "state": "COMPLETING Reason=None"},
            *(85, "ended", "ended by Slurm (cancelled, preempted or requeued)"),
        ),
        (
            STOPPED | {"saves": 12, "requeue_refused": True},
            *(85, "stopped", "scontrol requeue: no"),
        ),
        # The first rank's own code, not the largest, nor 143 of those that were ended with it.
        (FAILED_FIRST | {"saves": 12}, 9, "requeued", "rank 3 on node2: Exited with exit code 9"),
        (FAILED_FIRST, 9, "stopped", "no step was saved"),
        (
            {"srun_says": f"{ended(1, 'Killed')}\n{STOPPED['srun_says']}", "srun_code": 137, "saves": 12},
            *(137, "requeued", "rank 1 on node1: Killed"),
        ),
        (
            {"srun_says": ended(2, "Segmentation fault (core dumped)"), "srun_code": 139},
            *(139, "stopped", "rank 2 on node2: Segmentation fault"),
        ),
        (  # before Python could listen
            {"srun_says": ended(0, "User defined signal 2"), "srun_code": 140, "saves": 12},
            *(85, "requeued", "stopped by a signal"),
        ),
        (
            {"srun_says": ended(0, "Exited with exit code 2"), "srun_code": 2, "saves": 12},
            *(2, "stopped", "this is a mistake in what was asked"),
        ),
        (
            {"srun_says": "srun: error: Unable to create step for job 7: \"no\" nodes", "srun_code": 1},
            *(1, "stopped", "failed with code 1: srun: error: Unable to create step for job 7: no nodes"),
        ),
        ({"setup": ["export X=1", "false"]}, 1, "stopped", "setup: false failed; not started again"),
        ({"modules": ["cuda"]}, 1, "stopped", "module load cuda failed"),
    ],
)  # fmt: skip
def test_what_comes_next(
    tmp_path: Path, case: dict[str, Any], code: int, following: str, reason: str
) -> None:
    found, record, calls = run_script(tmp_path, **case)
    assert (found, record["exit_code"], record["next"]) == (code, code, following)
    assert reason in record["reason"]
    tried = following == "requeued" or bool(case.get("requeue_refused"))
    assert any(call.startswith("scontrol requeue 30007") for call in calls) == tried
    ends = re.findall(r"^srun: error: node", case.get("srun_says", ""), flags=re.MULTILINE)
    assert len(record["ranks"]) == len(ends)


def test_setup_reaches_every_rank_and_foreign_launchers_do_not(tmp_path: Path) -> None:
    text = rendered(tmp_path, setup=["export FROM_SETUP=yes"], env={"FROM_ENV": "two words"})
    assert (
        text.index("export FROM_SETUP=yes")
        < text.index("export FROM_ENV='two words'")
        < text.index("\nsrun ")
    )
    assert re.search(r"^unset RANK WORLD_SIZE ", text, flags=re.MULTILINE)


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in PROFILES:
        (GOLDEN / f"{each.stem}.sbatch").write_text(golden_text(each))
