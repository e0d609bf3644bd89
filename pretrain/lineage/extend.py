"""Extending a run: it goes on to more tokens than it was made for. Imports no torch.

Where the longer run's schedule makes the steps that were made, the extended run is that longer run, bit for
bit. A wsd schedule does so up to the step at which the shorter run's decay began, so the run goes back to its
last checkpoint before. Schedules that fall all the way make other steps from the warm-up on: such a run is
extended by a new stretch alone, whose first step optimizer.schedule.start_step says.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import NamedTuple

from data_pipeline.files.toml_config import ConfigError, apply_override, validate
from pretrain.config import RunConfig, differences
from pretrain.lineage.changes import has_later, saved_steps
from pretrain.quantities import count
from pretrain.train.schedule import Difference, first_difference, schedule_factor

KEYS = (
    *("total_tokens", "optimizer.schedule", "optimizer.schedule.*"),
    *("model.depth.*.dense_frac", "model.depth.*.ramp_frac"),
)
"""Patterns of the keys that an extension may set: the run's length, and what is told in shares of it."""
_SHAPES = {
    "cosine": "falls by half a cosine",
    "linear": "falls by equal differences",
    "exponential": "falls by equal ratios",
    "wsd": "stays until it falls by equal differences",
    "constant": "stays",
}


class Extension(NamedTuple):
    """A run that goes on."""

    config: RunConfig
    step: int
    """The step of the checkpoint that it goes on from."""
    told: str
    """One sentence for people, without the run's name."""


def is_key(override: str) -> bool:
    """Whether a text key=value sets a key of KEYS."""
    return any(fnmatchcase(override.partition("=")[0].strip(), pattern) for pattern in KEYS)


def plan_extension(old: RunConfig, overrides: Sequence[str]) -> Extension | None:
    """The extension of the run of `old`, which has begun, by key=value texts of KEYS; None if the run is that
    long already. Raises ConfigError, with what to do, for one that cannot be."""
    values = old.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    new = validate(RunConfig, values, source="--extend")
    if not differences(old, new):
        return None
    steps = saved_steps(old.run_dir)
    _check_longer(old, new, steps)
    start_step = new.optimizer.schedule.start_step
    if start_step != old.optimizer.schedule.start_step:
        return _new_stretch(old, new, steps)
    found = first_difference(old, new, until=steps[-1])
    if found is None:
        told = f"goes on after step {steps[-1]} as a run of {count(new.num_steps)} steps would"
        return Extension(new, steps[-1], f"{_longer(old, new)}; {told}")
    if found.key != "optimizer.schedule":
        raise ConfigError(_of_ramp(old, new, found))
    schedule = old.optimizer.schedule
    if schedule.kind != "wsd" or found.steps <= schedule.start_step + schedule.warmup_steps:
        raise ConfigError(_of_schedule(old, new, steps))
    before = [step for step in steps if step <= found.steps]
    if not before:
        raise ConfigError(
            f"{old.run_dir}: the decay of its wsd schedule began behind step {found.steps}, and no "
            f"checkpoint before it is left (there are {_listed(steps)}), so that the stable phase cannot go "
            f"on. Either a new stretch begins at the end, optimizer.schedule.start_step={steps[-1]}; or "
            "train the longer run under another name=..., and keep more of its checkpoints (keep_checkpoints)"
        )
    told = (
        f"its decay began behind step {found.steps}, so the stable phase goes on after step {before[-1]}, as "
        f"in a run of {count(new.num_steps)} steps"
    )
    return Extension(new, before[-1], f"{_longer(old, new)}; {told}")


def _check_longer(old: RunConfig, new: RunConfig, steps: Sequence[int]) -> None:
    """Raise ConfigError unless `new` is longer than the run of `old`, which has checkpoints of `steps`."""
    asked = f"--extend total_tokens={new.total_tokens} is {count(new.num_steps)} steps"
    if steps and new.num_steps <= steps[-1]:
        raise ConfigError(
            f"{asked}, and {old.run_dir} has made {count(steps[-1])}; give more than "
            f"{old.total_tokens:,} tokens. --branch NAME --from-step N makes a shorter run of its first steps"
        )
    if new.num_steps <= old.num_steps:
        raise ConfigError(
            f"{asked}, and {old.run_dir} is {count(old.num_steps)} steps long; give more than "
            f"{old.total_tokens:,} tokens. --branch NAME --from-step N makes a run of its first steps that "
            "goes on in another way"
        )
    if not steps:
        raise ConfigError(
            f"{old.run_dir} has no checkpoint that an extension could go on from: train it first, or begin "
            "the longer run under another name=..."
        )


def _new_stretch(old: RunConfig, new: RunConfig, steps: Sequence[int]) -> Extension:
    """The extension by a stretch with a schedule of its own."""
    schedule, start_step = new.optimizer.schedule, new.optimizer.schedule.start_step
    if start_step not in steps or start_step < old.optimizer.schedule.start_step:
        raise ConfigError(
            f"optimizer.schedule.start_step = {start_step}: a new stretch begins at a checkpoint; "
            f"{old.run_dir} has those of steps {_listed(steps)}"
        )
    if (found := first_difference(old, new, until=start_step)) is not None:
        raise ConfigError(_of_ramp(old, new, found))
    peak = new.optimizer.learning_rate
    ends = peak * schedule_factor(new.num_steps - 1, new.num_steps, schedule)
    rises = f"rises over {schedule.warmup_steps} steps to" if schedule.warmup_steps else "begins at"
    shape = f"{_SHAPES[schedule.kind]}{'' if schedule.kind == 'constant' else f' to {ends:g}'}"
    told = (
        f"steps {start_step + 1} to {count(new.num_steps)} are a new stretch, in which the learning rate "
        f"{rises} {peak:g} and {shape}: the curve is that of no single schedule"
    )
    return Extension(new, start_step, f"{_longer(old, new)}; {told}")


def _longer(old: RunConfig, new: RunConfig) -> str:
    return f"extended from {count(old.num_steps)} to {count(new.num_steps)} steps"


def _of_schedule(old: RunConfig, new: RunConfig, steps: Sequence[int]) -> str:
    """Say why a schedule cannot be extended from where the run is."""
    kind = new.optimizer.schedule.kind
    return (
        f"{old.run_dir}: no {kind} schedule of {count(new.num_steps)} steps has made the first "
        f"{steps[-1]} steps as they were made. A new stretch has a schedule of its own, warm-up included: "
        f"say where it begins, optimizer.schedule.start_step={steps[-1]} (and, of optimizer.schedule, "
        "warmup_steps, kind and min_factor, if they are to be others)"
    )


def _of_ramp(old: RunConfig, new: RunConfig, found: Difference) -> str:
    """Say why the ramp of depth routing does not let a run be extended, with the values that do."""
    modality = found.key.rpartition(".")[2]
    depth, share = old.model.depth[modality], old.num_steps / new.num_steps
    return (
        f"{found.key}: dense_frac and ramp_frac are shares of the run, so that a run of "
        f"{count(new.num_steps)} steps has other ratios behind step {found.steps} than {old.run_dir} had; "
        f"keep the ramp where it was: {found.key}.dense_frac={depth.dense_frac * share!r} "
        f"{found.key}.ramp_frac={depth.ramp_frac * share!r}"
    )


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def told_aside(config: RunConfig, step: int) -> str:
    """The words for what is moved aside when the run goes on from `step`; "" if nothing is."""
    later = [saved for saved in saved_steps(config.run_dir) if saved > step]
    if not has_later(config.run_dir, step):
        return ""
    what = f"checkpoints of steps {_listed(later)} and " if later else ""
    return f"; {what}later rows of metrics are set aside in {config.run_dir / 'checkpoints'}"
