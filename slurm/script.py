"""A run and a profile -> the text of a batch script: a pure function, in the words of job.sbatch.j2."""

import shlex
from pathlib import Path

import jinja2

from parallel.launch import REQUEUE_EXIT_CODE
from slurm.profile import Profile

USER_ERROR_CODE = 2
"""What a rank exits with for a mistake in what was asked (pretrain.train)."""


def render(profile: Profile, *, name: str, run_dir: Path, config: Path, folder: Path, python: str) -> str:
    """The batch script of a run.

    `name`: of the run; `run_dir`, `config` (the resolved one), `folder` (to run in): absolute paths as nodes
    see them; `python`: the interpreter where the profile names none.
    """
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("slurm", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    template.filters["quote"] = shlex.quote
    srun_words, command = _command(profile, config, folder, python)
    return template.get_template("job.sbatch.j2").render(
        options=[
            _quoted(word) for word in sbatch_options(profile, name=name, run_dir=run_dir, folder=folder)
        ],
        run_dir=str(run_dir),
        max_requeues=profile.max_requeues,
        cpus_per_task=profile.cpus_per_task,
        modules=profile.modules,
        setup=profile.setup,
        env=tuple(profile.env.items()),
        nodes=profile.nodes,
        world_size=profile.world_size,
        ranks_per_node=profile.ranks_per_node,
        srun_words=srun_words,
        command=command,
        requeue_code=REQUEUE_EXIT_CODE,
        user_error_code=USER_ERROR_CODE,
    )


def sbatch_options(profile: Profile, *, name: str, run_dir: Path, folder: Path) -> list[str]:
    """The job's options, as words of sbatch's command line; % in file names is sbatch's own."""
    memory = profile.memory_gb_per_node
    values: dict[str, str | int | bool | None] = {
        "job-name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "nodes": profile.nodes,
        "ntasks-per-node": profile.ranks_per_node,
        "gpus-per-node": profile.gpus_per_node or None,
        "cpus-per-task": profile.cpus_per_task,
        "mem": None if memory is None else "0" if memory == 0 else f"{memory}G",
        "time": profile.time_limit,
        # To the ranks and not to the batch shell (no "B:"), and not SIGUSR1, which NCCL uses.
        "signal": f"USR2@{profile.signal_lead_s}",
        "requeue": True if profile.max_requeues else None,
        "no-requeue": None if profile.max_requeues else True,
        "open-mode": "append",
        "output": f"{str(run_dir).replace('%', '%%')}/slurm/job_%j.out",
        "chdir": str(folder),
        **profile.options,
    }
    return [
        f"--{option}" if value is True else f"--{option}={value}"
        for option, value in values.items()
        if value is not None
    ]


def _quoted(word: str) -> str:
    """In the script's header sbatch takes quotes as a shell does."""
    option, equals, value = word.partition("=")
    return f"{option}={shlex.quote(value)}" if equals else option


def _command(profile: Profile, config: Path, folder: Path, python: str) -> tuple[list[str], list[str]]:
    """(words for srun, what each task executes). No shell stands between srun and a rank: it would die of the
    signal that tells ranks to stop, and leave its rank behind."""
    container = profile.container
    own = python if container.kind == "none" else "python"
    rank = [profile.python or own, "-m", "pretrain.train", str(config)]
    if container.kind == "pyxis":
        words = [f"--container-image={container.image}", f"--container-workdir={folder}"]
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [*words, *mounts, *container.options], rank
    if container.kind == "apptainer":
        binds = [f"--bind={mount}" for mount in container.mounts]
        inside = ["apptainer", "exec", f"--pwd={folder}", *binds, *container.options, str(container.image)]
        return [], [*inside, *rank]
    return [], rank
