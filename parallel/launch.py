"""The launcher's environment variables of this process, and those of the ranks that it starts.

This is the only module of the project that reads os.environ. It imports no torch at module level, so that the
process that starts ranks stays light.
"""

import ctypes
import os
import re
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_STORE_FD = "MOTLEY_STORE_FD"
_ARITHMETIC = ("ATEN_CPU_CAPABILITY", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# srun sets these variables in every task of a step. SLURM_NTASKS and SLURM_PROCID would not do: the process
# of a batch script has them too, and would wait for ranks that nobody started.
_SLURM = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID")


class LaunchError(ValueError):
    """The environment describes no set of ranks that can start; the message names variables and a remedy."""


@dataclass(frozen=True)
class RankFacts:
    """The rank of this process, and the address at which ranks meet."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    """0 if there is only one rank."""
    store_fd: int | None
    """For rank 0 of `spawn`, the inherited listening socket of the store, so that no other process can take
    the port before it is used."""
    launcher: str
    """"torchrun" (or anything that sets its variables, as DeepSpeed's does), "slurm", "spawn" or "single"."""
    attempt_dir: str | None = None
    """For a rank of a Slurm job of Motley, or of `spawn` (MOTLEY_ATTEMPT_DIR), the folder of its end record;
    in a job also of its log."""


def rank_facts(environ: Mapping[str, str] | None = None) -> RankFacts:
    """The facts of this rank from the variables of torchrun (or `spawn`) or of srun; else one rank.

    Raises LaunchError if the variables of a launcher are incomplete or contradict each other.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env or "WORLD_SIZE" in env:
        facts = _torchrun_facts(env)
    elif all(name in env for name in _SLURM):
        facts = _slurm_facts(env)
    else:
        return RankFacts(0, 1, 0, "127.0.0.1", 0, None, "single")
    if not 0 <= facts.rank < facts.world_size:
        raise LaunchError(
            f"{facts.launcher} says this is rank {facts.rank} of {facts.world_size}: ranks count from 0"
        )
    return facts


def _torchrun_facts(env: Mapping[str, str]) -> RankFacts:
    missing = [name for name in _TORCHRUN if name not in env]
    if missing:
        raise LaunchError(
            f"RANK or WORLD_SIZE is set, but {', '.join(missing)} is not: a launcher sets all of "
            f"{', '.join(_TORCHRUN)}; unset them to run as one process"
        )
    return RankFacts(
        rank=_integer(env, "RANK"),
        world_size=_integer(env, "WORLD_SIZE"),
        local_rank=_integer(env, "LOCAL_RANK"),
        master_addr=env["MASTER_ADDR"],
        master_port=_integer(env, "MASTER_PORT"),
        store_fd=_integer(env, _STORE_FD) if _STORE_FD in env else None,
        launcher="spawn" if "MOTLEY_SPAWN" in env else "torchrun",
        attempt_dir=env.get("MOTLEY_ATTEMPT_DIR") if "MOTLEY_SPAWN" in env else None,
    )


def _slurm_facts(env: Mapping[str, str]) -> RankFacts:
    job = _integer(env, "SLURM_JOB_ID")
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
    return RankFacts(
        rank=_integer(env, "SLURM_PROCID"),
        world_size=_integer(env, "SLURM_STEP_NUM_TASKS"),
        local_rank=_integer(env, "SLURM_LOCALID"),
        master_addr=env.get("MASTER_ADDR") or first_host(nodes),
        # Ranks cannot agree on a free port before they meet; the job id keeps the jobs of a node apart.
        master_port=_integer(env, "MASTER_PORT") if "MASTER_PORT" in env else 15_000 + job % 15_000,
        store_fd=None,
        launcher="slurm",
        attempt_dir=env.get("MOTLEY_ATTEMPT_DIR"),
    )


@dataclass(frozen=True)
class JobFacts:
    """Slurm's variables about the job of a batch script."""

    job: int
    """The id of the job; in an array, of the whole array."""
    task: int | None
    """The index within an array; None outside of one."""
    own_id: int
    """The job's own id, which an element of an array has beside the id of the array."""
    attempt: int
    """0, and one more after every requeue."""
    nodelist: str

    @property
    def name(self) -> str:
        """The job's name for scontrol, squeue and scancel: "812" or "812_3"."""
        return f"{self.job}" if self.task is None else f"{self.job}_{self.task}"


def job_facts(environ: Mapping[str, str] | None = None) -> JobFacts:
    """The job whose batch script runs this process. Raises LaunchError outside of a job."""
    env = os.environ if environ is None else environ
    if "SLURM_JOB_ID" not in env:
        raise LaunchError("SLURM_JOB_ID is not set: this command runs in a Slurm job; see `motley submit`")
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
    """The name of this machine: Slurm's name in a task of Slurm, else its host name."""
    env = os.environ if environ is None else environ
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def _integer(env: Mapping[str, str], name: str) -> int:
    try:
        return int(env[name])
    except ValueError:
        raise LaunchError(f"environment variable {name} = {env[name]!r} is not an integer") from None


def first_host(nodelist: str) -> str:
    """The first node of a Slurm node list: "gpu[003-007,9]-ib,login" -> "gpu003-ib"."""
    first = re.match(r"[^,\[]*(?:\[[^\]]*\][^,\[]*)*", nodelist)
    assert first is not None  # the pattern also matches the empty string
    host = re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
    if not host:
        raise LaunchError(f"the Slurm node list {nodelist!r} names no node")
    return host


def own_arguments(argv: Sequence[str]) -> list[str]:
    """`argv` without the --local_rank=N that DeepSpeed's launcher adds (deepspeed 0.19.8,
    launcher/launch.py:229).

    The variable LOCAL_RANK has the same value.
    """
    return [argument for argument in argv if not re.fullmatch(r"--local_rank=\d+", argument)]


def prepare_environment(facts: RankFacts) -> None:
    """Set variables that libraries read. It must be called before deepspeed is imported.

    DeepSpeed 0.19.8 reads LOCAL_RANK (runtime/engine.py:1966, runtime/zero/partition_parameters.py:1138), and
    without DS_ACCELERATOR it prints a warning on a machine without accelerator.
    """
    os.environ["LOCAL_RANK"] = str(facts.local_rank)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if _cuda_available() else "cpu")


def _cuda_available() -> bool:
    import torch

    return torch.cuda.is_available()


def choose_device(facts: RankFacts) -> "torch.device":
    """The device of this rank: a GPU if there is one, else the CPU.

    Slurm may show a task only its own GPU (--gpus-per-task), whose index is then 0 on every rank.
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
    """The environment for `processes` child processes on this machine, without variables of a launcher.

    OMP_NUM_THREADS is `threads` if given, else its current value, else cores / processes.
    """
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in (*_TORCHRUN, _STORE_FD, "MOTLEY_SPAWN", "MOTLEY_ATTEMPT_DIR")
    }
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    return env


def rank_environment(
    rank: int, world_size: int, store: socket.socket, attempt_dir: str | None = None
) -> dict[str, str]:
    """The variables of a rank of `spawn`; `store` is the socket at which ranks meet, `attempt_dir` the
    folder of end records."""
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
    if attempt_dir is not None:
        variables["MOTLEY_ATTEMPT_DIR"] = attempt_dir
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
        if os.getppid() != parent:  # the parent died before the call
            os._exit(1)
