"""What the environment says about this process, and starting ranks on this machine.

The only file of the project that reads os.environ. Imports no torch at module level: the process that starts
ranks stays light.
"""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from parallel.exit_codes import ExitCode

if TYPE_CHECKING:
    import torch


FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_STORE_FD = "MOTLEY_STORE_FD"
_ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# srun sets these in every task of a step. SLURM_NTASKS and SLURM_PROCID alone do not show that: a batch
# script's own process has them too, and would wait for ranks that nobody started.
_SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")


class LaunchError(ValueError):
    """The environment describes no set of ranks that can start; says which variables and what to do."""


@dataclass(frozen=True)
class RankFacts:
    """Who this process is among the ranks, and where they meet."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    """0 in a world of one: there is nobody to meet."""
    store_fd: int | None
    """Rank 0 of our own spawn: the listening socket of the meeting place, inherited, so that no other process
    can take the port between choosing and using it."""
    launcher: str
    """"torchrun" (or anything that sets its variables, as DeepSpeed's does), "slurm", "spawn" or "single"."""
    attempt_dir: str | None = None
    """Of a rank of our Slurm jobs (MOTLEY_ATTEMPT_DIR): where the job keeps what this rank prints, in a file
    of its own, and wants to be told how the rank ended."""


def rank_facts(environ: Mapping[str, str] | None = None) -> RankFacts:
    """Read the launcher's variables: torchrun's (or our own spawn's), else srun's, else a world of one.

    Raises LaunchError where the variables of a launcher are incomplete or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in _TORCHRUN if name not in env]
        if missing:
            raise LaunchError(
                f"RANK or WORLD_SIZE is set, but {', '.join(missing)} is not: a launcher sets all of "
                f"{', '.join(_TORCHRUN)}; unset them to run as one process"
            )
        store_fd = _integer(env, _STORE_FD) if _STORE_FD in env else None
        facts = RankFacts(
            rank=_integer(env, "RANK"),
            world_size=_integer(env, "WORLD_SIZE"),
            local_rank=_integer(env, "LOCAL_RANK"),
            master_addr=env["MASTER_ADDR"],
            master_port=_integer(env, "MASTER_PORT"),
            store_fd=store_fd,
            launcher="spawn" if "MOTLEY_SPAWN" in env else "torchrun",
        )
    elif all(name in env for name in _SLURM):
        job = _integer(env, "SLURM_JOB_ID")
        nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
        facts = RankFacts(
            rank=_integer(env, "SLURM_PROCID"),
            world_size=_integer(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_integer(env, "SLURM_LOCALID"),
            master_addr=env.get("MASTER_ADDR") or first_host(nodes),
            # Ranks cannot agree on a free port before they have met; the job id keeps jobs of a node apart.
            master_port=_integer(env, "MASTER_PORT") if "MASTER_PORT" in env else 15_000 + job % 15_000,
            store_fd=None,
            launcher="slurm",
            attempt_dir=env.get("MOTLEY_ATTEMPT_DIR"),
        )
    else:
        return RankFacts(0, 1, 0, "127.0.0.1", 0, None, "single")
    if not 0 <= facts.rank < facts.world_size:
        raise LaunchError(
            f"{facts.launcher} says this is rank {facts.rank} of {facts.world_size}: ranks count from 0"
        )
    return facts


@dataclass(frozen=True)
class JobFacts:
    """What Slurm tells a batch script of its job."""

    job: int
    """The number by which people know it; of an array that of the whole."""
    task: int | None
    """Index within an array; None outside of one."""
    own_id: int
    """What the job is alone: an element of an array has a number of its own too."""
    attempt: int
    """0, and one more at each requeue."""
    nodelist: str

    @property
    def name(self) -> str:
        """What scontrol, squeue and scancel take: "812" or "812_3"."""
        return f"{self.job}" if self.task is None else f"{self.job}_{self.task}"


def job_facts(environ: Mapping[str, str] | None = None) -> JobFacts:
    """The job that this process is the batch script of. Raises LaunchError outside of one."""
    env = os.environ if environ is None else environ
    if "SLURM_JOB_ID" not in env:
        raise LaunchError("SLURM_JOB_ID is not set: this is the work of a Slurm job; see `motley submit`")
    own = _integer(env, "SLURM_JOB_ID")
    array = "SLURM_ARRAY_JOB_ID" in env
    return JobFacts(
        job=_integer(env, "SLURM_ARRAY_JOB_ID") if array else own,
        task=_integer(env, "SLURM_ARRAY_TASK_ID") if array else None,
        own_id=own,
        attempt=_integer(env, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in env else 0,
        nodelist=env.get("SLURM_JOB_NODELIST", ""),
    )


def node_name(environ: Mapping[str, str] | None = None) -> str:
    """This machine, by the name that Slurm has for it where this is a task of Slurm's."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"environment variable {name} = {env[name]!r} is not an integer") from None


def first_host(nodelist: str) -> str:
    """First node of a Slurm node list: "gpu[003-007,9]-ib,login" -> "gpu003-ib"."""
    first = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", nodelist)
    assert first is not None  # the pattern also matches the empty string
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
    if not host:
        raise LaunchError(f"the Slurm node list {nodelist!r} names no node")
    return host


def own_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` without what DeepSpeed's launcher puts before a script's arguments: --local_rank=N, which
    LOCAL_RANK says too (deepspeed 0.19.8, launcher/launch.py:229)."""
    return [argument for argument in argv if not re.fullmatch(r"--local_rank=\d+", argument)]


def prepare_environment(facts: RankFacts) -> None:
    """Set what libraries read from the environment instead of taking arguments. Before importing deepspeed.

    DeepSpeed 0.19.8 reads LOCAL_RANK (runtime/engine.py:1966, runtime/zero/partition_parameters.py:1138), and
    without DS_ACCELERATOR it prints a warning on a machine without accelerator.
    """
    os.environ["LOCAL_RANK"] = str(facts.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _cuda_available() else "cpu")


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def choose_device(facts: RankFacts) -> "torch.device":
    """This rank's device: a GPU where there is one, else the CPU.

    Under Slurm a task may be shown one GPU of its own (--gpus-per-task); its index is then 0 on every rank.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1 and facts.launcher == "slurm":
        return torch.device("cuda", 0)
    if facts.local_rank >= visible:
        raise LaunchError(
            f"local rank {facts.local_rank} has no GPU of its own: {visible} visible. "
            f"Start at most {visible} processes here, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return torch.device("cuda", facts.local_rank)


def arithmetic_settings(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables by which libraries choose a CPU's instructions, and with them the rounding of sums."""
    env = os.environ if environ is None else environ
    return {name: env[name] for name in _ARITHMETIC if name in env}


def child_environment(processes: int, *, threads: int | None = None) -> dict[str, str]:
    """This process's environment for `processes` that share the machine, without any launcher's variables.

    OMP_NUM_THREADS: `threads` if given, else what is set, else cores / processes.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in (*_TORCHRUN, _STORE_FD, "MOTLEY_SPAWN")
    }
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return env


def rank_environment(rank: int, world_size: int, store: socket.socket) -> dict[str, str]:
    """What a rank of our own spawn finds in its environment; `store` is the socket they meet at."""
    variables = {
        "MOTLEY_SPAWN": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.getsockname()[1]),
    }
    if rank == 0:
        variables[_STORE_FD] = str(store.fileno())
    return variables


def open_store_socket() -> socket.socket:
    """A listening socket on a free port of this machine, for rank 0 to inherit."""
    store = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    store.bind(("127.0.0.1", 0))
    store.listen(128)
    return store


def die_with_parent(parent: int) -> None:
    """Have the kernel SIGKILL this process when `parent` dies (Linux): no rank outlives its launcher."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the request
            os._exit(1)


def spawn(argv: Sequence[str], processes: int, *, threads: int | None = None, grace_s: float = 10.0) -> int:
    """Run `python ARGV...` as `processes` ranks on this machine and wait for all of them.

    SIGTERM, SIGUSR2 and SIGINT go on to every rank. When one rank fails the others are told to end, and
    killed `grace_s` later. Returns 0, or 85 if ranks stopped for requeue (or were killed by a signal that
    went on to them before they could handle it) and none failed before, or the code of the rank that failed
    first (128 + signal number for one that was killed), which is named on stderr.
    """
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in FORWARDED_SIGNALS}
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with open_store_socket() as store:
            base, parent = child_environment(processes, threads=threads), os.getpid()
            for rank in range(processes):
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *argv],
                        env=base | rank_environment(rank, processes, store),
                        pass_fds=(store.fileno(),) if rank == 0 else (),
                        # Its own group: Ctrl-C at a terminal then reaches ranks once, through us.
                        process_group=0,
                        preexec_fn=lambda: die_with_parent(parent),
                    )
                )
        return _wait(ranks, received, grace_s)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], received: list[int], grace_s: float) -> int:
    result: int | None = None
    deadline = float("inf")
    requeue = False
    forwarded: set[int] = set()
    running = dict(enumerate(ranks))
    while running:
        while received:
            number = received.pop(0)
            forwarded.add(number)
            for process in running.values():
                process.send_signal(number)
        for rank, process in list(running.items()):
            if (code := process.poll()) is None:
                continue
            del running[rank]
            requeue |= code == ExitCode.REQUEUE
            if code in (ExitCode.DONE, ExitCode.REQUEUE) or result is not None:
                continue
            # A rank that a forwarded signal killed had not got to where it handles it: stopped, not failed.
            result = ExitCode.REQUEUE if -code in forwarded else 128 - code if code < 0 else code
            deadline = time.monotonic() + grace_s
            cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            others = f"; ending the other {len(running)}" if running else ""
            where = f"rank {rank} of {len(ranks)} (pid {process.pid})"
            print(f"motley: {where} {cause}{others}", file=sys.stderr, flush=True)
            for other in running.values():
                other.terminate()
        if time.monotonic() > deadline:
            for process in running.values():
                process.kill()
        if running:
            time.sleep(0.05)
    return result if result is not None else ExitCode.REQUEUE if requeue else ExitCode.DONE
