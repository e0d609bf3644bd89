"""Slurm's commands are programs that say what a case wants; tests/slurm_cluster/ asks the real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from slurm import commands

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Makes programs of these bash lines the only ones of Slurm's."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def make(**programs: str) -> None:
        for name, text in programs.items():
            (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
            (tmp_path / name).chmod(0o755)

    return make


def test_the_state_of_a_job_that_is_ours(install: Install) -> None:
    install(squeue="echo 'PENDING tiny'; echo \"$*\" >&2")
    assert commands.state_in_queue("812_3", "tiny") == "PENDING"
    assert commands.state_in_queue("812", "another") is None
    install(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert commands.state_in_queue("812", "tiny") is None
    install(squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match="whether job 812 is queued: slurm_load_jobs error: Unable"):
        commands.state_in_queue("812", "tiny")


def test_what_a_job_inherits_is_not_what_answers_are_asked_in(
    install: Install, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LC_ALL", "C.UTF-8")
    install(sbatch=f"echo \"$LC_ALL $*\" >'{tmp_path}'/seen; echo '17;east'", scontrol='echo "$LC_ALL $*"')
    assert commands.sbatch(["--nodes=2"], tmp_path / "job") == 17
    seen = (tmp_path / "seen").read_text()
    assert seen.endswith(f"--parsable --nodes=2 {tmp_path}/job\n") and not seen.startswith("C ")
    assert commands.ask("scontrol", "ping").stdout == "C ping\n"


def test_what_slurm_says_of_a_job(install: Install) -> None:
    install(
        scontrol="echo 'JobId=7 JobName=tiny JobState=RUNNING TRES=cpu=4,mem=1G Command=/a b'; echo JobId=8"
    )
    assert commands.show_job("7") | {"Command": ""} == {
        **{"JobId": "7", "JobName": "tiny", "JobState": "RUNNING", "TRES": "cpu=4,mem=1G", "Command": ""}
    }
    install(scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert commands.show_job("7") == {}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: commands.cancel(["7", "8_1"]), "scancel 7 8_1"),
        (lambda: commands.requeue("8_1"), "scontrol requeue 8_1"),
        (
            lambda: commands.exclude("7", ["node1", "node3"]),
            "scontrol update JobId=7 ExcNodeList=node1,node3",
        ),
    ],
)
def test_slurm_is_told_and_its_refusal_is_shown(
    install: Install, tmp_path: Path, call: Callable[[], None], words: str
) -> None:
    install(**dict.fromkeys(("scancel", "scontrol"), f'echo "${{0##*/}} $*" >"{tmp_path}/seen"'))
    call()
    assert (tmp_path / "seen").read_text().strip() == words
    install(**dict.fromkeys(("scancel", "scontrol"), "echo 'access denied' >&2; exit 1"))
    with pytest.raises(ConfigError, match="access denied"):
        call()


def test_steps_are_killed_and_not_the_batch_script(install: Install, tmp_path: Path) -> None:
    install(
        squeue="printf '%s\\n' 7.0 7.1 7.batch 7.extern",
        scancel=f'echo "$*" >>"{tmp_path}/seen"',
    )
    commands.kill_steps("7")
    assert (tmp_path / "seen").read_text() == "--signal=KILL 7.0 7.1\n"
    install(squeue=":")
    commands.kill_steps("7")
    assert (tmp_path / "seen").read_text().count("\n") == 1


def test_a_controller_that_is_away_is_told_from_a_refusal(install: Install) -> None:
    install(scontrol="echo 'Unable to contact slurm controller (connect failure)' >&2; exit 1")
    with pytest.raises(commands.ControllerUnreachable):
        commands.requeue("7")
    with pytest.raises(commands.ControllerUnreachable):
        commands.show_job("7")
    install(scontrol="echo 'Requested operation is presently disabled' >&2; exit 1")
    with pytest.raises(ConfigError) as refused:
        commands.requeue("7")
    assert not isinstance(refused.value, commands.ControllerUnreachable)


def test_nodes_of_a_list_and_no_slurm(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(scontrol="printf 'gpu3\\ngpu4\\n'")
    assert commands.hostnames("gpu[3-4]") == ["gpu3", "gpu4"]
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match="scontrol is not on the PATH: this machine has no Slurm"):
        commands.hostnames("gpu[3-4]")


def test_what_is_in_the_queue_by_one_question(install: Install, tmp_path: Path) -> None:
    lines = "812_3|PENDING|JobArrayTaskLimit|N/A|a|b\\n813|RUNNING|None|2026-01-01T00:00:00|tiny\\n"
    install(squeue=f"echo \"$*\" >>'{tmp_path}'/seen; printf '{lines}'")
    assert commands.in_queue(["812_3", "813", "814"]) == {
        "812_3": commands.Queued("PENDING", "JobArrayTaskLimit", "N/A", "a|b"),
        "813": commands.Queued("RUNNING", "None", "2026-01-01T00:00:00", "tiny"),
    }
    assert commands.in_queue([]) == {}
    (asked,) = (tmp_path / "seen").read_text().splitlines()
    assert "--jobs=812_3,813,814" in asked
    install(squeue="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert commands.in_queue(["1"]) == {}
    install(squeue="echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(ConfigError, match="squeue: Unable to contact"):
        commands.in_queue(["1"])


def test_how_a_job_ended_from_accounting_else_from_the_controller(install: Install) -> None:
    known = "echo 'JobId=7 JobName=tiny JobState=NODE_FAIL Reason=None'"
    install(sacct="printf 'another|COMPLETED\\ntiny|CANCELLED by 1000\\n'", scontrol=known)
    assert commands.final_state("7", ["tiny"]) == "CANCELLED by 1000"
    install(sacct="echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert commands.final_state("7", ["tiny"]) == "NODE_FAIL"
    assert commands.final_state("7", ["other"]) is None  # the id was given to another's job
    install(scontrol="echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert commands.final_state("7", ["tiny"]) is None
    install(scontrol="echo 'Unable to contact slurm controller' >&2; exit 1")
    assert commands.final_state("7", ["tiny"]) is None


def test_what_slurm_leaves_a_job_that_is_cancelled(install: Install) -> None:
    install(scontrol="printf 'Configuration data\\nKillWait                = 30 sec\\nOther = 1\\n'")
    assert commands.kill_wait_s() == 30
    install(scontrol="exit 1")
    assert commands.kill_wait_s() is None


def test_what_slurm_is_told_outlives_its_sigterm(install: Install) -> None:
    """Of a requeue: the node that is to be excluded next would not be."""
    install(scontrol="kill -TERM $$")
    commands.exclude("7", ["node1"])
