"""comparison.json: the resolved plan of a comparison, written before anything runs, and what was added to it.

This module imports no torch.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from data_pipeline.files.atomic import write_json
from data_pipeline.files.json_file import read_object
from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.compare_config import CompareConfig
from pretrain.comparison.ladder_config import OWN_BUDGETS
from pretrain.comparison.plan import ComparisonPlan
from pretrain.config import RunConfig, differences
from pretrain.run_dir import finished_step
from pretrain.run_files import METRICS

PLAN = "comparison.json"
SHOWN = 20
"""Number of differences that an error lists."""
EXECUTION = ("concurrent_runs", "threads_per_run", "pilot_deviation")
"""Fields of a comparison that may change between two calls of `motley compare`: they decide nothing."""
GROWS = (
    "seeds",
    "extra_baseline_seeds",
    "rates",
    "tuning_seeds",
    "vary",
    "budgets.total_tokens",
    "budgets.tokens_per_parameter",
    "budgets.train_flops",
)
"""Lists of a comparison that may become longer, as may its arms and sizes. What has run is kept."""


class Addition(BaseModel):
    """Runs that were added to a comparison after some of it had finished, so that its results were there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    runs: tuple[str, ...]
    """Names of the runs that were added."""
    finished: PositiveInt
    """Number of runs that had finished before."""


class PlanRecord(BaseModel):
    """The content of comparison.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    comparison: CompareConfig
    runs: dict[str, RunConfig]
    """Empty until the runs that come first have ended."""
    first: dict[str, RunConfig] = {}
    """By path in the directory, the runs that come first; empty once they have ended."""
    added: tuple[Addition, ...] = ()


def write_plan(plan: ComparisonPlan) -> None:
    """Write comparison.json. Raises ConfigError if the directory was made by a plan that this one is not, or
    does not add seeds or arms to."""
    target, added = plan.directory / PLAN, ()
    runs = {run.name: run.config for run in plan.runs} if not plan.first else {}
    first = {str(run.config.run_dir.relative_to(plan.directory)): run.config for run in plan.first}
    if target.exists():
        before = _read(plan)
        _check_lengths_stay(plan, before)
        _refuse(plan, _other_lines(plan, before))
        added = before.added + _addition(plan, before)
        runs = runs or before.runs
    elif plan.directory.exists() and any(plan.directory.glob(f"*/{METRICS}")):
        raise ConfigError(
            f"{plan.directory}: holds runs but no comparison.json, so it was not made by a comparison; "
            f"move it away, or choose another name in {plan.path}"
        )
    plan.directory.mkdir(parents=True, exist_ok=True)
    record = PlanRecord(comparison=plan.config, runs=runs, first=first, added=added)
    write_json(target, record.model_dump(mode="json"))


def check_same_plan(plan: ComparisonPlan) -> None:
    """Raise ConfigError, with all differences outside EXECUTION, if comparison.json is not of this plan."""
    before = _read(plan)
    if not before.runs:
        raise ConfigError(
            f"{plan.directory}: nothing to report on yet: learning rates are chosen, and no run at them has "
            "begun; leave out --report-only to go on"
        )
    missing = [f"  run {name}: only in {plan.path.name}" for name in _new_runs(plan, before)]
    _refuse(plan, _other_lines(plan, before) + missing)


def additions(plan: ComparisonPlan) -> tuple[Addition, ...]:
    """What was added to a comparison after some of it had finished."""
    return _read(plan).added


def _read(plan: ComparisonPlan) -> PlanRecord:
    target = plan.directory / PLAN
    try:
        values = read_object(target, advice=f"move {plan.directory} away and start again")
    except FileNotFoundError:
        raise ConfigError(
            f"{target}: no such file: nothing has run yet; leave out --report-only to start the comparison"
        ) from None
    return validate(PlanRecord, values, source=str(target))


def _new_runs(plan: ComparisonPlan, before: PlanRecord) -> tuple[str, ...]:
    """Names of the runs of a plan that its comparison.json does not have."""
    if plan.first:
        return ()
    return tuple(run.name for run in plan.runs if run.name not in before.runs)


def _addition(plan: ComparisonPlan, before: PlanRecord) -> tuple[Addition, ...]:
    """What a plan adds to its comparison.json, if a run of that has finished."""
    new = _new_runs(plan, before)
    finished = sum(finished_step(config) == config.num_steps for config in before.runs.values())
    return (Addition(runs=new, finished=finished),) if new and finished else ()


def _other_lines(plan: ComparisonPlan, before: PlanRecord) -> list[str]:
    """A line for every difference that neither decides nothing nor only adds seeds or arms."""
    ours = {run.name: run.config for run in plan.runs}
    lines = [f"  run {name}: only there" for name in before.runs.keys() - ours.keys()]
    pairs: list[tuple[str, BaseModel, BaseModel]] = [("comparison", plan.config, before.comparison)]
    if plan.config.rates:  # a larger grid may choose other rates for runs that have not begun
        begun = {name for name, config in before.runs.items() if (config.run_dir / METRICS).exists()}
        ours = {name: config for name, config in ours.items() if name in begun and not plan.first}
    pairs += [(name, ours[name], before.runs[name]) for name in ours if name in before.runs]
    return lines + [
        f"  {where}.{key}: {now!r} in {plan.path.name}, {then!r} there"
        for where, planned, written in pairs
        for key, now, then in differences(planned, written)
        if not (where == "comparison" and (key in EXECUTION or _grows(key, now, then, before)))
    ]


def _grows(key: str, now: Any, then: Any, before: PlanRecord) -> bool:
    """Whether a key of a comparison differs because a list became longer, or an arm is new."""
    if key in GROWS or (key.startswith("sizes.") and key.endswith(f".{OWN_BUDGETS}")):
        return set(then or ()) <= set(now or ())
    first, _, rest = key.partition(".")
    known: dict[str, Mapping[str, Any]] = {"arms": before.comparison.arms, "sizes": before.comparison.sizes}
    return first in known and not any(rest == name or rest.startswith(f"{name}.") for name in known[first])


def _check_lengths_stay(plan: ComparisonPlan, before: PlanRecord) -> None:
    """Raise ConfigError if timing rounds would be made again after they have given runs their lengths."""
    if plan.config.match == "seconds" and before.runs and any(run.round is not None for run in plan.first):
        raise ConfigError(
            f'{plan.directory}: match = "seconds" gave its runs their lengths by timing rounds; rounds that '
            "are made again, for an arm or a size that is new or a round that is missing, would give others. "
            f"Take out of {plan.path} what is new and put back what is missing, or give the comparison "
            "another name"
        )


def _refuse(plan: ComparisonPlan, lines: list[str]) -> None:
    """Raise ConfigError with the lines, if there are any."""
    if lines:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise ConfigError(
            f"{plan.directory}: made by another plan of this name:\n"
            + "\n".join(sorted(lines)[:SHOWN] + more)
            + "\nSeeds, arms, sizes and budgets may be added. Else give it another name, or move that "
            "directory away."
        )
