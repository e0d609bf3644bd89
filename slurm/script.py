"""Batch scripts as pure functions: a profile and a job become sbatch options, the text of the script (from
job.sbatch.j2) and the command of a task."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import jinja2

from data_pipeline.files.printable import hidden_characters, printable
from data_pipeline.files.toml_config import ConfigError
from slurm.profile import Profile


def render(
    profile: Profile, *, name: str, submission: Path, folder: Path, python: str, array: str | None = None
) -> str:
    """The batch script of a run, or of an array of runs.

    `submission`: the folder of the submission (for an array, of the comparison's); `folder`: where the script
    runs. Both are absolute paths as nodes see them. `python`: the interpreter of the supervisor, which runs
    on the host even where ranks run in a container. `array`: indices in sbatch's form, such as "0-7%2".
    """
    options = sbatch_options(profile, name=name, logs=submission.parent, folder=folder, array=array)
    return _render(
        profile, options, python, f"-m slurm.attempt {shlex.quote(str(submission))}", supervised=True
    )


def render_command(
    profile: Profile,
    *,
    name: str,
    logs: Path,
    folder: Path,
    python: str,
    arguments: str,
    array: str | None = None,
) -> str:
    """The batch script of one process of `python`, without supervisor.

    `arguments` are words of bash, already quoted, so that they may hold $SLURM_ARRAY_TASK_ID.
    """
    options = command_options(profile, name=name, logs=logs, folder=folder, array=array)
    return _render(profile, options, python, arguments, supervised=False)


def _render(
    profile: Profile, options: Sequence[str], python: str, arguments: str, *, supervised: bool
) -> str:
    header = [_quoted(word) for word in options]
    words = {"python": python, "its arguments": arguments, **{f"env.{k}": v for k, v in profile.env.items()}}
    words |= {f"modules[{i}]": module for i, module in enumerate(profile.modules)}
    words |= {f"setup[{i}]": line.replace("\t", " ") for i, line in enumerate(profile.setup)}
    for name, word in words.items():
        _check_shown(name, word)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slurm", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["quote"] = shlex.quote
    return environment.get_template("job.sbatch.j2").render(
        options=header,
        supervised=supervised,
        python=python,
        arguments=arguments,
        modules=profile.modules,
        setup=profile.setup,
        env=tuple(profile.env.items()),
    )


def sbatch_options(
    profile: Profile, *, name: str, logs: Path, folder: Path, array: str | None = None
) -> list[str]:
    """The options of a run's job, as words of sbatch's command line. `logs`: the folder of its output."""
    memory = profile.memory_gb_per_node
    least, ranks = profile.node_counts[0], profile.ranks_per_node
    # If the number of nodes may vary, Slurm gives no more nodes than the fewest nodes have tasks. One task a
    # node, with the CPUs of all its ranks, makes it give as many nodes as it can.
    varies = least < profile.nodes
    values: dict[str, str | int | bool | None] = {
        "job-name": name,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "nodes": f"{least}-{profile.nodes}" if varies else profile.nodes,
        "ntasks-per-node": None if varies else ranks,
        "gpus-per-node": profile.gpus_per_node or None,
        "cpus-per-task": profile.cpus_per_task * (ranks if varies else 1),
        "mem": None if memory is None else "0" if memory == 0 else f"{memory}G",
        "time": profile.time_limit,
        # The signal goes to the ranks, not to the batch shell ("B:"). NCCL uses SIGUSR1, so this is SIGUSR2.
        "signal": f"USR2@{profile.signal_lead_s}",
        "requeue": True if profile.max_requeues else None,
        "no-requeue": None if profile.max_requeues else True,
        "open-mode": "append",
        # sbatch expands % in the name of the output
        "output": f"{str(logs).replace('%', '%%')}/job_{'%j' if array is None else '%A_%a'}.out",
        "chdir": str(folder),
        "array": array,
        **profile.options,
    }
    return _words(values)


def _words(values: dict[str, str | int | bool | None]) -> list[str]:
    return [
        f"--{option}" if value is True else f"--{option}={value}"
        for option, value in values.items()
        if value is not None
    ]


def command_options(
    profile: Profile, *, name: str, logs: Path, folder: Path, array: str | None = None
) -> list[str]:
    """`sbatch_options` for a job of one process that uses no GPU."""
    alone = {"nodes": 1, "min_nodes": None, "gpus_per_node": 0, "tasks_per_node": 1}
    words = sbatch_options(profile.model_copy(update=alone), name=name, logs=logs, folder=folder, array=array)
    return [word for word in words if not word.startswith("--signal=")]


def _quoted(word: str) -> str:
    """A word as it stands in the script's header, where sbatch reads quotes as a shell does.

    Raises ConfigError for a control character: a line break would end the comment that the header is, and
    bash would run what follows.
    """
    option, equals, value = word.partition("=")
    _check_shown(option, value)
    return f"{option}={shlex.quote(value)}" if equals else option


def _check_shown(name: str, word: str) -> None:
    """Raise ConfigError for a word that would not stand in the batch script as a person reads it."""
    if hidden_characters(word):
        raise ConfigError(
            f"{name} = {printable(word)} of the job: a batch script takes no line breaks in a word and no "
            "other control characters; take them out of the profile, of runs_dir or of the path"
        )


def task_command(
    profile: Profile, module: str, argument: Path, *, folder: Path, python: str
) -> tuple[list[str], list[str]]:
    """(options of srun, command of a task) that run `python -m module argument` as the profile says.

    There is no shell between srun and a rank: the signal that tells ranks to stop would kill the shell and
    leave the rank behind.
    """
    container = profile.container
    own = python if container.kind == "none" else "python"
    task = [profile.python or own, "-m", module, str(argument)]
    if container.kind == "pyxis":
        words = [f"--container-image={container.image}", f"--container-workdir={folder}"]
        mounts = [f"--container-mounts={','.join(container.mounts)}"] if container.mounts else []
        return [*words, *mounts, *container.options], task
    if container.kind == "apptainer":
        binds = [f"--bind={mount}" for mount in container.mounts]
        inside = ["apptainer", "exec", f"--pwd={folder}", *binds, *container.options, str(container.image)]
        return [], [*inside, *task]
    return [], task
