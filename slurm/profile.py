"""The profile of a site: partition, account, nodes, time limit, environment, container.

This module imports no torch.
"""

import re
from pathlib import Path
from typing import Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.toml_config import load_config
from slurm.options import LEGAL, OWN_KEY

_LIMIT = re.compile(r"(?:(?P<d>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContainerConfig(_Frozen):
    """The container that ranks are started in; the batch script itself runs on the host."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    """For pyxis a value of --container-image; for apptainer a .sif file, a sandbox or a URI."""
    mounts: tuple[str, ...] = ()
    """Mounts are written "/host/path:/path/inside". The run directory, the data and the folder that the run
    is submitted from must have the same paths inside as outside."""
    options: tuple[str, ...] = ()
    """Further options for srun (pyxis) or for apptainer exec, such as "--nv"."""

    @model_validator(mode="after")
    def _check(self) -> "ContainerConfig":
        if (self.kind == "none") != (self.image is None):
            raise ValueError(f'kind = "{self.kind}" {"takes no" if self.image else "needs an"} image')
        return self


class PreflightConfig(BaseModel):
    """The table [preflight] of a profile: the requirements on a node before ranks start on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    min_free_gpu_gib: NonNegativeFloat = 0.0
    """Free memory of each GPU; 0: it is not checked. The number of GPUs, gpus_per_node, is always checked."""
    min_free_run_dir_gib: NonNegativeFloat = 1.0
    """Free space on the file system of the run directory."""
    min_free_disk_gib: dict[str, NonNegativeFloat] = {}
    """Free space by absolute path, as nodes see it: {"/scratch" = 20}."""
    max_clock_skew_s: PositiveFloat = 5.0
    """Largest difference of a node's clock from the median of all nodes."""
    all_reduce: bool = True
    """Whether nodes do a short all-reduce. If not, they do not meet, and clocks are not compared either."""
    timeout_s: int = Field(default=180, ge=10, le=3600)
    """Time limit of the whole check, with the import of torch."""
    max_excluded: NonNegativeInt = 2
    """Number of nodes that a submission may exclude before it stops."""

    @field_validator("min_free_disk_gib")
    @classmethod
    def _are_absolute(cls, paths: dict[str, float]) -> dict[str, float]:
        for path in paths:
            if not Path(path).is_absolute():
                raise ValueError(f'"{path}" is no absolute path (variables are not expanded)')
        return paths


class Profile(_Frozen):
    """One site: the header of a batch script and the environment of a rank. None: the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: PositiveInt = 1
    """Number of nodes; the option `--nodes` of `motley submit` overrides it."""
    min_nodes: PositiveInt | None = None
    """The least number of nodes that an attempt may get, where nodes are busy or lost. None: `nodes`."""
    gpus_per_node: NonNegativeInt = 0
    """0: --gpus-per-node is not used (a site that needs --gres sets it in [options])."""
    tasks_per_node: PositiveInt | None = None
    """Ranks per node. None: one per GPU."""
    cpus_per_task: PositiveInt = 1
    memory_gb_per_node: NonNegativeInt | None = None
    """0: all memory of a node."""
    time_limit: str
    """The time limit in sbatch's form: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    signal_lead_s: int = Field(180, ge=0, le=65_535)
    """Seconds before the time limit at which every rank gets the signal (SIGUSR2) to save and stop. The time
    must cover the longest step and a checkpoint. Slurm may send the signal up to a minute early."""
    max_requeues: NonNegativeInt = 10
    """How often a job may restart, not counting preemptions. It restarts only if it has saved a later step
    than before, or if its check of nodes found a bad node."""
    chain: PositiveInt = 1
    """Number of jobs in a chain, for sites that forbid requeues. A job of the chain starts when the job
    before it has ended. Jobs left over when the run is done are cancelled."""
    hang_after_s: NonNegativeInt = 3600
    """Ranks that write no log, metrics or checkpoint for so long hang, and are killed. 0: never."""
    python: str | None = None
    """The Python of the ranks. None: the interpreter of `motley submit`, or "python" in a container."""
    modules: tuple[str, ...] = ()
    """Names for `module load`, which comes before setup."""
    setup: tuple[str, ...] = ()
    """Lines of bash that are run once, on the first node, before ranks start. Variables that they export
    reach every rank. The job ends if a line fails."""
    env: dict[str, str] = {}
    """Environment variables of every rank."""
    container: ContainerConfig = ContainerConfig()
    preflight: PreflightConfig = PreflightConfig()
    options: dict[str, str | int | bool] = {}
    """Further options of sbatch by their long names: exclusive = true, constraint = "h100"."""

    @field_validator("time_limit")
    @classmethod
    def _is_limit(cls, value: str) -> str:
        if _seconds(value) is None:
            raise ValueError("a time limit is minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, not 0")
        return value

    @field_validator("options")
    @classmethod
    def _are_options(cls, options: dict[str, str | int | bool]) -> dict[str, str | int | bool]:
        for name, value in options.items():
            if name in OWN_KEY:
                raise ValueError(f'"{name}" is set by {OWN_KEY[name]}')
            if name not in LEGAL:
                hint = did_you_mean(name, LEGAL, otherwise=";")
                raise ValueError(f'"{name}" is no option of sbatch{hint} Legal: {", ".join(sorted(LEGAL))}')
            if value is False:
                raise ValueError(f'"{name}" = false: leave it out')
        return options

    @field_validator("env")
    @classmethod
    def _are_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f'"{name}" is not the name of an environment variable')
        return env

    @model_validator(mode="after")
    def _check(self) -> "Profile":
        if not self.gpus_per_node and self.tasks_per_node is None:
            raise ValueError("gpus_per_node or tasks_per_node is required: how many ranks has a node?")
        if self.gpus_per_node and self.tasks_per_node not in (None, self.gpus_per_node):
            raise ValueError(
                f"tasks_per_node = {self.tasks_per_node} with gpus_per_node = {self.gpus_per_node}: "
                "a rank drives one GPU; leave tasks_per_node out"
            )
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ValueError(f"min_nodes = {self.min_nodes} is more than nodes = {self.nodes}")
        if self.chain > 1 and self.max_requeues:
            raise ValueError(
                f"chain = {self.chain} with max_requeues = {self.max_requeues}: a job goes on in the next of "
                "its chain or starts again itself, one or the other; set max_requeues = 0 or leave chain out"
            )
        limit_s = _seconds(self.time_limit)
        if limit_s is not None and self.signal_lead_s >= limit_s:
            raise ValueError(
                f"signal_lead_s = {self.signal_lead_s} is not less than time_limit = {self.time_limit} "
                f"({limit_s} s): ranks would be told to stop as they start"
            )
        return self

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def node_counts(self) -> range:
        """The numbers of nodes that Slurm may give a job."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)


def load_profile(path: str | Path, *, nodes: int | None = None) -> Profile:
    """Read a profile from its TOML file. Raises ConfigError naming file, field and what is legal."""
    return load_config(Profile, path, [] if nodes is None else [f"nodes={nodes}"])


def _seconds(limit: str) -> int | None:
    """The seconds of a time limit (sbatch(1), --time); None if the text is not a time limit, or is 0."""
    match = _LIMIT.fullmatch(limit)
    if match is None:
        return None
    parts = [int(part) for part in match["parts"].split(":")]
    if match["d"] is not None:
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:
        hours, (minutes, seconds) = 0, (*parts, 0)[:2]
    return ((int(match["d"] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds or None
