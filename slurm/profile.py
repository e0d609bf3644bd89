"""What a site is: partition, account, nodes, time limit, environment, container. Imports no torch."""

import difflib
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

from data_pipeline.files.toml_config import load_config
from slurm.options import LEGAL, OWN_KEY

_LIMIT = re.compile(r"(?:(?P<d>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContainerConfig(_Frozen):
    """How ranks are started in a container; the batch script itself runs on the host."""

    kind: Literal["none", "pyxis", "apptainer"] = "none"
    image: str | None = None
    """pyxis: what --container-image takes; apptainer: a .sif file, a sandbox or a URI."""
    mounts: tuple[str, ...] = ()
    """"/host/path:/path/inside". The run directory, the data and the folder that the run is submitted from
    must be seen inside under the paths that they have outside."""
    options: tuple[str, ...] = ()
    """Further words for srun (pyxis) or for apptainer exec, such as "--nv"."""

    @model_validator(mode="after")
    def _check(self) -> "ContainerConfig":
        if (self.kind == "none") != (self.image is None):
            raise ValueError(f'kind = "{self.kind}" {"takes no" if self.image else "needs an"} image')
        return self


class PreflightConfig(BaseModel):
    """The table [preflight] of a profile: what a node must have before ranks start on it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = True
    min_free_gpu_gib: NonNegativeFloat = 0.0
    """Of each GPU; 0: not looked at. That there are gpus_per_node is looked at in any case."""
    min_free_run_dir_gib: NonNegativeFloat = 1.0
    """Where the run directory is."""
    min_free_disk_gib: dict[str, NonNegativeFloat] = {}
    """By absolute path, as nodes see it: {"/scratch" = 20}."""
    max_clock_skew_s: PositiveFloat = 5.0
    """From the median of all nodes."""
    all_reduce: bool = True
    """A short sum over the nodes. False: nodes do not meet, and clocks are not compared either."""
    timeout_s: int = Field(default=180, ge=10, le=3600)
    """For all of it, with the import of torch."""
    max_excluded: NonNegativeInt = 2
    """Nodes that a submission may exclude before it stops."""

    @field_validator("min_free_disk_gib")
    @classmethod
    def _are_absolute(cls, paths: dict[str, float]) -> dict[str, float]:
        for path in paths:
            if not Path(path).is_absolute():
                raise ValueError(f'"{path}" is no absolute path (variables are not filled in)')
        return paths


class Profile(_Frozen):
    """One site, as one sbatch header and the environment of a rank. None: the site's default."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    nodes: PositiveInt = 1
    """`--nodes` of `motley submit` goes before it."""
    min_nodes: PositiveInt | None = None
    """The least that an attempt may have to do with, where nodes are busy or lost. None: `nodes`."""
    gpus_per_node: NonNegativeInt = 0
    """0: none are asked for by --gpus-per-node (a site that wants --gres has it in [options])."""
    tasks_per_node: PositiveInt | None = None
    """Ranks of a node. None: one per GPU."""
    cpus_per_task: PositiveInt = 1
    memory_gb_per_node: NonNegativeInt | None = None
    """0: all that a node has."""
    time_limit: str
    """As sbatch takes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS."""
    signal_lead_s: int = Field(180, ge=0, le=65_535)
    """Seconds ahead of the time limit at which every rank is told (SIGUSR2) to save and stop. Slurm may be up
    to a minute early; it must cover the longest step and a checkpoint."""
    max_requeues: NonNegativeInt = 10
    """How often a job may start again, preemptions not counted. It does so only if it has saved a later step
    than before, or if its check of nodes found a bad one."""
    chain: PositiveInt = 1
    """For sites that forbid requeues: so many jobs, each of which goes on when the one before has ended.
    Those left over when the run is done are cancelled."""
    hang_after_s: NonNegativeInt = 3600
    """Ranks that wrote nothing at all for so long, neither log, metrics nor checkpoint, are taken to hang and
    are ended. 0: they are left alone."""
    python: str | None = None
    """None: the interpreter that runs `motley submit`; in a container "python"."""
    modules: tuple[str, ...] = ()
    """For `module load`, before setup."""
    setup: tuple[str, ...] = ()
    """Commands of bash, a line each, run once on the first node before ranks start; what they export reaches
    every rank. The job ends if one fails."""
    env: dict[str, str] = {}
    """Environment of every rank."""
    container: ContainerConfig = ContainerConfig()
    preflight: PreflightConfig = PreflightConfig()
    options: dict[str, str | int | bool] = {}
    """Any further option of sbatch by its long name: exclusive = true, constraint = "h100"."""

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
                near = difflib.get_close_matches(name, LEGAL, n=1, cutoff=0.5)
                hint = f'; did you mean "{near[0]}"?' if near else ";"
                raise ValueError(f'"{name}" is no option of sbatch{hint} Legal: {", ".join(sorted(LEGAL))}')
            if value is False:
                raise ValueError(f'"{name}" = false: leave it out')
        return options

    @field_validator("env")
    @classmethod
    def _are_names(cls, env: dict[str, str]) -> dict[str, str]:
        for name in env:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ValueError(f'"{name}" is no name of an environment variable')
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
        """All that Slurm may give."""
        return range(self.min_nodes or self.nodes, self.nodes + 1)


def load_profile(path: str | Path, *, nodes: int | None = None) -> Profile:
    """A profile from its TOML file. Raises ConfigError naming file, field and what is legal."""
    return load_config(Profile, path, [] if nodes is None else [f"nodes={nodes}"])


def _seconds(limit: str) -> int | None:
    """Seconds of a time limit (sbatch(1), --time); None if it is none."""
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
