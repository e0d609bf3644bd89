"""Waiting for what a job of a test does, and doing harm to it."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from slurm.records import saved_step
from tests.slurm_cluster.conftest import Submitted

Make = Callable[..., Submitted]
LONG = 100_000
"""Steps that no test waits for."""


class Telling(Protocol):
    def text(self) -> str: ...


def wait_until(condition: Callable[[], bool], run: Telling, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain\n{run.text()}"
        time.sleep(0.02)


def saved(run: Submitted) -> int:
    return saved_step(run.run_dir)


def rank_processes(job: int, rank: int) -> list[int]:
    """Processes of one rank of a job (the id that the job is alone); its step is the job's last."""
    return processes_with(SLURM_JOB_ID=job, SLURM_PROCID=rank)


def processes_with(**variables: int) -> list[int]:
    """Ranks with these variables in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in variables.items()}
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            environment = set((folder / "environ").read_bytes().split(b"\0"))
            command = (folder / "cmdline").read_bytes().split(b"\0")
            # srun, in the batch script, has a rank 0 of its own and names what it starts
            if wanted <= environment and b"pretrain.train" in command and not command[0].endswith(b"srun"):
                found.append(int(folder.name))
    return found


def is_pending(pid: int, number: int) -> bool:
    """Whether a signal has reached a process that has not handled it yet, as one that is stopped."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return any(int(lines[mask], 16) >> (number - 1) & 1 for mask in ("SigPnd", "ShdPnd"))


def signal_rank(job: int, rank: int, number: int) -> None:
    for pid in rank_processes(job, rank):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_rank(job: int, rank: int) -> None:
    """SIGKILL to one rank: as the kernel does it when memory is out."""
    signal_rank(job, rank, signal.SIGKILL)
