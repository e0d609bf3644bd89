"""Rank facts from launchers' variables, and real ranks started, signalled and killed."""

import base64
import os
import socket
import subprocess
from pathlib import Path

import pytest

from parallel.launch import LaunchError, child_environment, first_host, own_arguments, rank_facts
from parallel.spawn import Ended, spawn
from tests.warm_python import executable

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "2950"}
SLURM = {
    "SLURM_JOB_ID": "31234",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
}


def test_no_launcher_is_a_world_of_one() -> None:
    facts = rank_facts({"PATH": "/bin"})
    assert (facts.rank, facts.world_size, facts.local_rank, facts.launcher) == (0, 1, 0, "single")


def test_torchrun() -> None:
    facts = rank_facts(TORCHRUN | SLURM)  # torchrun inside a Slurm job: the inner launcher counts
    assert (facts.rank, facts.world_size, facts.local_rank) == (3, 8, 1)
    assert (facts.master_addr, facts.master_port, facts.launcher) == ("node1", 2950, "torchrun")


def test_slurm_step() -> None:
    facts = rank_facts(SLURM)
    assert (facts.rank, facts.world_size, facts.local_rank) == (9, 16, 1)
    assert (facts.master_addr, facts.master_port, facts.launcher) == ("gpu007", 15_000 + 1_234, "slurm")
    facts = rank_facts(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "777"})
    assert (facts.master_addr, facts.master_port) == ("10.0.0.1", 777)
    assert facts.attempt_dir is None
    assert rank_facts(SLURM | {"MOTLEY_ATTEMPT_DIR": "/a"}).attempt_dir == "/a"


def test_a_batch_script_without_srun_is_a_world_of_one() -> None:
    batch = {"SLURM_JOB_ID": "5", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    assert rank_facts(batch).world_size == 1


@pytest.mark.parametrize(
    ("env", "complaint"),
    [
        ({"RANK": "0"}, "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE = 'eight' is not an integer"),
        (SLURM | {"SLURM_STEP_NODELIST": "[]"}, "names no node"),
    ],
)
def test_a_broken_environment_is_explained(env: dict[str, str], complaint: str) -> None:
    with pytest.raises(LaunchError, match=complaint):
        rank_facts(env)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("a-b[12,15]-ib,c", "a-b12-ib"),
        ("r[1-2]n[05-06]", "r1n05"),
    ],
)
def test_first_host_of_a_slurm_node_list(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_child_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert child_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert child_environment(10 * cores)["OMP_NUM_THREADS"] == "1"
    assert child_environment(1, threads=3)["OMP_NUM_THREADS"] == "3"
    assert not TORCHRUN.keys() & child_environment(1).keys()
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment(2)["OMP_NUM_THREADS"] == "7"


_MEET = """
import os
from datetime import timedelta
import torch
from parallel.launch import rank_facts
from parallel.world import meet
facts = rank_facts()
meet(facts, torch.device("cpu"), timedelta(seconds=60))
total = torch.tensor(facts.rank + 0.5)
torch.distributed.all_reduce(total)
os.write(1, f"sum {total.item()} of {facts.world_size}\\n".encode())
torch.distributed.destroy_process_group()
"""


@pytest.fixture
def meeting(tmp_path: Path) -> Path:
    script = tmp_path / "meet.py"
    script.write_text(_MEET)
    return script


def test_our_own_ranks_meet(meeting: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert spawn([str(meeting)], 2) == Ended(0)
    assert capfd.readouterr().out.splitlines() == ["sum 2.0 of 2"] * 2


def test_ranks_of_torchrun_meet(meeting: Path) -> None:
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(meeting)]
    environment = child_environment(2)
    done = subprocess.run(
        [executable(), *words], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["sum 2.0 of 2"] * 2


def test_ranks_of_the_deepspeed_launcher_meet(meeting: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(executable(), "-m", "deepspeed.launcher.launch", "--log_level=error"),
        "--world_info=" + base64.urlsafe_b64encode(b'{"localhost": [0, 1]}').decode(),
        *("--master_addr=127.0.0.1", f"--master_port={port}", str(meeting)),
    ]
    env = child_environment(2) | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines().count("sum 2.0 of 2") == 2


def test_what_the_deepspeed_launcher_adds_is_no_override() -> None:
    assert own_arguments(["--local_rank=3", "run.toml", "seed=2"]) == ["run.toml", "seed=2"]


def test_ranks_of_srun_meet(meeting: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = child_environment(2) | SLURM | {"SLURM_STEP_NUM_TASKS": "2", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [executable(), str(meeting)],
            env=shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_ADDR": "127.0.0.1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=300)[0] for rank in ranks] == ["sum 2.0 of 2\n"] * 2
    assert [rank.returncode for rank in ranks] == [0, 0]
