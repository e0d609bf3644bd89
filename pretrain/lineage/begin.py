"""An attempt begins with what `motley train` and `motley submit` do to a run's directory before ranks start.

This module imports no torch.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.files.toml_config import ConfigError, set_key, validate
from pretrain.config import RunConfig, load
from pretrain.dotted_keys import value_at
from pretrain.lineage import branch, extend
from pretrain.lineage.changes import as_extended, change_of, finish_change, make_change, saved_steps
from pretrain.run_dir import check_config, finished_step
from pretrain.run_files import CONFIG


@dataclass(frozen=True)
class Ask:
    """The wishes of a person beside a run and key=value texts."""

    extend: bool = False
    """Whether the run goes on to the total_tokens among the texts."""
    branch: str | None = None
    """The name of a new run that begins at a checkpoint of the run; the texts are those of the new run."""
    from_step: int | None = None
    """The step of the checkpoint that the run goes back to, or that the branch begins at."""


NOTHING_ELSE = Ask()
"""The run is trained, or continued."""


@dataclass(frozen=True)
class Beginning:
    """An attempt that is about to begin."""

    config: RunConfig
    argv: list[str]
    """What its ranks are given: a run and key=value texts that mean `config`."""
    prepare: Callable[[], str | None]
    """Does what was asked to the run's directory, and returns one sentence about it. To be called once
    `config` is found good; a process killed in it leaves a run that the same command continues."""

    def prepare_and_tell(self) -> None:
        """Prepare the run's directory, and print the sentence if there is one."""
        if (told := self.prepare()) is not None:
            print(told, flush=True)


def beginning(run: str | Path, overrides: Sequence[str], ask: Ask) -> Beginning:
    """The attempt that a person asks for. Before `prepare` nothing is written, except that a change of the
    run that was interrupted is finished. Raises ConfigError, with what to do, for what cannot be."""
    if ask.extend and (ask.branch is not None or ask.from_step is not None):
        other = "--branch" if ask.branch is not None else "--from-step"
        raise ConfigError(
            f"--extend and {other} do not go together: one after the other does what both ask for; "
            "--branch NAME --from-step N takes total_tokens=... too"
        )
    if ask.branch is not None:
        return _branch(as_extended(load(run)), ask.branch, ask.from_step, overrides)
    if ask.extend:
        return _extension(run, overrides)
    wanted = load(run, overrides)
    config = as_extended(wanted)
    argv = [str(run), *overrides]
    if ask.from_step is not None:
        return _return(config, ask.from_step, argv)

    def prepare() -> str | None:
        finish_change(config.run_dir)
        if config.num_steps == wanted.num_steps:
            return None
        return f"{config.run_dir}: it was extended to {config.num_steps} steps, which counts"

    return Beginning(config, argv, prepare)


def is_done(config: RunConfig) -> bool:
    """Whether the run is done, which is said on stdout. A run whose last checkpoint is gone is not, which is
    said too. Raises ConfigError if it has no checkpoint left."""
    step = finished_step(config)
    if step is None:
        return False
    saved = saved_steps(config.run_dir)
    if step in saved:
        print(f"{config.run_dir} is done: {step} of {config.num_steps} steps. name=... starts another run")
        return True
    if not saved:
        raise ConfigError(
            f"{config.run_dir} was done at step {step}, and none of its checkpoints is left; its metrics "
            "are. Put the checkpoint back, or train it again under another name=..."
        )
    print(f"{config.run_dir}: it was done at step {step}, whose checkpoint is gone", flush=True)
    return False


def _extension(run: str | Path, overrides: Sequence[str]) -> Beginning:
    """The attempt that extends a run."""
    changes = [text for text in overrides if extend.is_key(text)]
    if not any(text.startswith("total_tokens=") for text in changes):
        raise ConfigError("--extend: say how far, such as --extend total_tokens=2_000_000")
    asked = load(run, [text for text in overrides if text not in changes])
    old = as_extended(_with_own(asked, [text.partition("=")[0].strip() for text in changes]))
    _check_begun(old)
    planned = extend.plan_extension(old, changes)
    if planned is None:  # the same command again

        def finish() -> None:
            finish_change(old.run_dir)

        return Beginning(old, [str(run), *overrides], finish)

    def prepare() -> str:
        finish_change(old.run_dir)
        aside = extend.told_aside(old, planned.step)
        change = change_of("extend", old.run_dir, step=planned.step, old=old, new=planned.config)
        make_change(old.run_dir, change)
        return f"{old.run_dir}: {planned.told}{aside}"

    return Beginning(planned.config, [str(run), *overrides], prepare)


def _with_own(asked: RunConfig, keys: Sequence[str]) -> RunConfig:
    """`asked` with the values that the run in its directory has for `keys`, which the command line sets: what
    is given there is asked of the extension, and need not be what the run was made with."""
    if not (asked.run_dir / CONFIG).exists():
        return asked
    there, values = load(asked.run_dir).model_dump(mode="json"), asked.model_dump(mode="json")
    for key in keys:
        with suppress(KeyError):  # a key that there is not is refused where the extension is read
            set_key(values, key, value_at(there, key))
    return validate(RunConfig, values, source=str(asked.run_dir / CONFIG))


def _return(config: RunConfig, step: int, argv: list[str]) -> Beginning:
    """The attempt that goes back to the checkpoint of `step`."""
    _check_begun(config)
    steps, start_step = saved_steps(config.run_dir), config.optimizer.schedule.start_step
    if step not in steps:
        there = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"--from-step {step}: {config.run_dir} has no checkpoint of that step; there are {there}. A run "
            "keeps its last keep_checkpoints of them"
        )
    if step < start_step:
        raise ConfigError(
            f"--from-step {step}: the schedule of {config.run_dir} begins at step {start_step} "
            "(optimizer.schedule.start_step), and the steps before were made under another; go back to "
            f"{start_step} or later, or begin a branch at step {step}"
        )

    def prepare() -> str:
        finish_change(config.run_dir)
        aside = extend.told_aside(config, step) or "; there is nothing behind it"
        make_change(config.run_dir, change_of("go back", config.run_dir, step=step))
        return f"{config.run_dir}: back to step {step}{aside}; without --from-step it goes on from its newest"

    return Beginning(config, argv, prepare)


def _branch(trunk: RunConfig, name: str, step: int | None, overrides: Sequence[str]) -> Beginning:
    """The attempt that begins, or continues, a branch of the run of `trunk`."""
    _check_begun(trunk)
    config = as_extended(branch.branch_config(trunk, name, overrides))
    argv = [str(config.run_dir), *overrides]
    if branch.exists(config, trunk, step):
        return Beginning(config, argv, lambda: finish_change(config.run_dir))
    at = branch.check_branch(trunk, config, step)
    return Beginning(config, argv, lambda: branch.make_branch(trunk, config, at))


def _check_begun(config: RunConfig) -> None:
    """Raise ConfigError unless the run directory holds the run of `config`, which has begun."""
    if not (config.run_dir / CONFIG).exists():
        raise ConfigError(
            f"{config.run_dir} holds no run yet: --extend, --branch and --from-step are for a run that has "
            "checkpoints; train it first"
        )
    finish_change(config.run_dir)
    check_config(config)
