"""Batch scripts as text, and as bash runs them. `python -m tests.slurm.test_script` writes golden files."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from slurm.profile import Profile, load_profile
from slurm.script import command_options, render, render_command, sbatch_options, task_command

PROFILES = sorted((Path(__file__).parents[2] / "slurm" / "profiles").glob("*.toml"))
GOLDEN = Path(__file__).parent / "golden"


def golden_text(profile: Path) -> str:
    return render(
        load_profile(profile),
        name="mot_7b",
        submission=Path("/shared/runs/mot_7b/slurm/1"),
        folder=Path("/shared/motley"),
        python="/shared/motley/.venv/bin/python",
    )


@pytest.mark.parametrize("profile", PROFILES, ids=lambda path: path.stem)
def test_golden(profile: Path) -> None:
    text = golden_text(profile)
    assert text == (GOLDEN / f"{profile.stem}.sbatch").read_text()
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


def of_site(**changes: Any) -> Profile:
    values: dict[str, Any] = {"tasks_per_node": 2, "nodes": 2, "time_limit": "1:00:00"}
    return validate(Profile, values | changes, source="test")


def rendered(folder: Path, python: str = "python3", **changes: Any) -> str:
    submission = folder / "runs" / "tiny" / "slurm" / "1"
    return render(of_site(**changes), name="tiny", submission=submission, folder=folder, python=python)


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


def test_no_line_break_leaves_the_header(tmp_path: Path) -> None:
    folder, changes = tmp_path / "a\ntouch ran", {"account": "a\ntouch ran"}
    for render_one in (lambda: rendered(folder), lambda: rendered(tmp_path, **changes)):
        with pytest.raises(ConfigError, match=r"--(account|chdir|output) = .*\\ntouch ran.* no line breaks"):
            render_one()


@pytest.mark.parametrize("hidden", ["\n", "\x1b[8m", "\x9b8m", "\u202e", "\u2028", "\r"])
@pytest.mark.parametrize("field", ["account", "modules", "setup", "env", "options"])
def test_no_hidden_character_enters_a_batch_script(tmp_path: Path, field: str, hidden: str) -> None:
    word = f"a{hidden}b"
    changes: dict[str, Any] = {
        "account": word,
        "modules": [word],
        "setup": ["true", word],
        "env": {"A": word},
        "options": {"comment": word},
    }
    with pytest.raises(ConfigError, match=r"(--account|modules\[0\]|setup\[1\]|env\.A|--comment) = a\\"):
        rendered(tmp_path, **{field: changes[field]})


def test_options_follow_from_the_profile(tmp_path: Path) -> None:
    def options(**changes: Any) -> list[str]:
        return sbatch_options(of_site(**changes), name="tiny", logs=tmp_path, folder=tmp_path)

    assert {"--nodes=2", "--ntasks-per-node=2", "--signal=USR2@180", "--requeue"} <= set(options())
    assert "--nodes=2" in options(min_nodes=2)
    varying = options(min_nodes=1, cpus_per_task=3)
    assert {"--nodes=1-2", "--cpus-per-task=6"} <= set(varying)
    assert not [word for word in varying if word.startswith("--ntasks-per-node")]
    assert "--no-requeue" in options(max_requeues=0) and "--requeue" not in options(max_requeues=0)
    array = sbatch_options(of_site(), name="tiny", logs=tmp_path, folder=tmp_path, array="0-7%2")
    assert {"--array=0-7%2", f"--output={tmp_path}/job_%A_%a.out"} <= set(array)
    alone = command_options(of_site(min_nodes=1), name="tiny", logs=tmp_path, folder=tmp_path)
    assert {"--nodes=1", "--ntasks-per-node=1"} <= set(alone)
    assert not [word for word in alone if word.startswith("--signal")]


@pytest.mark.parametrize(
    ("changes", "words", "command"),
    [
        ({}, [], ["/py", "-m", "pretrain.train", "/run/config.json"]),
        ({"python": "python"}, [], ["python", "-m", "pretrain.train", "/run/config.json"]),
        (
            {
                "container": {
                    "kind": "pyxis",
                    "image": "a#b",
                    "mounts": ["/s:/s", "/t:/t"],
                    "options": ["--x"],
                }
            },
            ["--container-image=a#b", "--container-workdir=/here", "--container-mounts=/s:/s,/t:/t", "--x"],
            ["python", "-m", "pretrain.train", "/run/config.json"],
        ),
        (
            {"container": {"kind": "apptainer", "image": "a.sif", "mounts": ["/s:/s"], "options": ["--nv"]}},
            [],
            [
                *("apptainer", "exec", "--pwd=/here", "--bind=/s:/s", "--nv", "a.sif"),
                *("python", "-m", "pretrain.train", "/run/config.json"),
            ],
        ),
    ],
)
def test_no_shell_is_between_srun_and_a_rank(
    changes: dict[str, Any], words: list[str], command: list[str]
) -> None:
    argument, folder = Path("/run/config.json"), Path("/here")
    found = task_command(of_site(**changes), "pretrain.train", argument, folder=folder, python="/py")
    assert found == (words, command)


PROBE = """#!/bin/bash
[ "$1" = -c ] && exit
{ printf '%s\\n' "$@"; env | grep -E '^(FROM_|RANK|MASTER_)'; } >"$(dirname "$0")/seen"
"""


def run(folder: Path, text: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        ["bash"],
        input=text,
        env={"PATH": os.environ["PATH"], "RANK": "5", "MASTER_PORT": "1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def python(tmp_path: Path) -> str:
    """An interpreter that only tells what it was asked for."""
    path = tmp_path / "my python"
    path.write_text(PROBE)
    path.chmod(0o755)
    return str(path)


def test_setup_reaches_the_supervisor_and_foreign_launchers_do_not(tmp_path: Path, python: str) -> None:
    text = rendered(tmp_path, python, setup=["export FROM_SETUP=yes"], env={"FROM_ENV": "two words"})
    done = run(tmp_path, text)
    assert done.returncode == 0, done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert seen[:3] == ["-m", "slurm.attempt", str(tmp_path / "runs" / "tiny" / "slurm" / "1")]
    assert sorted(seen[3:]) == ["FROM_ENV=two words", "FROM_SETUP=yes"]


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"setup": ["export X=1", "false", "touch reached"]}, "setup: false failed"),
        ({"modules": ["it's/1"], "setup": ["touch reached"]}, "module load it's/1 failed"),
    ],
)
def test_a_setup_that_fails_is_told_to_the_supervisor(
    tmp_path: Path, python: str, changes: dict[str, Any], why: str
) -> None:
    done = run(tmp_path, rendered(tmp_path, python, **changes))
    assert f"motley: {why}\n" in done.stderr
    assert (tmp_path / "seen").read_text().splitlines()[3:] == ["--failed", why]
    assert not (tmp_path / "reached").exists()


def test_an_interpreter_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = run(tmp_path, rendered(tmp_path, python="/no where/python"))
    assert done.returncode == 1
    assert re.search(
        r"^motley: '/no where/python', which submitted this job, does not run on ", done.stderr, re.M
    )


def test_a_command_without_supervisor(tmp_path: Path) -> None:
    text = render_command(
        of_site(setup=["export FROM_SETUP=yes"]),
        name="part",
        logs=tmp_path,
        folder=tmp_path,
        python=sys.executable,
        arguments="-c 'import json, os, sys; print(json.dumps([sys.argv[1:], os.environ[\"FROM_SETUP\"]]))' "
        "$((SLURM_ARRAY_TASK_ID + 1))/8",
        array="0-7",
    )
    done = run(tmp_path, text)
    assert done.returncode == 0 and json.loads(done.stdout) == [["1/8"], "yes"]
    failed = run(tmp_path, text.replace("export FROM_SETUP=yes", "false"))
    assert failed.returncode == 1 and "failed" in failed.stderr and failed.stdout == ""


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for each in PROFILES:
        (GOLDEN / f"{each.stem}.sbatch").write_text(golden_text(each))
