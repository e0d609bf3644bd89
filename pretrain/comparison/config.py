"""A comparison before it runs: the file, the runs that follow, and what is refused. Imports no torch."""

import copy
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from data_pipeline.files.atomic import write_json
from data_pipeline.files.toml_config import ConfigError, apply_override, load_toml, set_key, validate
from pretrain.comparison.matched_flops import matched
from pretrain.config import RunConfig, differences
from pretrain.run_files import METRICS

PLAN = "comparison.json"
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
SHOWN = 20
"""Differences listed in an error."""
SET_BY_COMPARISON = ("name", "seed")
SET_BY_MATCH = (
    "total_tokens",
    "tokens_per_step",
    "model.context_tokens",
    "data.train",
    "data.heldout",
    "runs_dir",
    "every_steps",
    "evaluate",
)
"""Equal in all arms: the same batches in the same order, and the same evaluation. Under match = "train_flops"
arms have as many steps as the baseline's training FLOPs last: it sets total_tokens."""
EXECUTION = ("concurrent_runs", "threads_per_run")
"""Fields of a comparison that may change between two calls."""


class CompareConfig(BaseModel):
    """Written before the first step runs: what is asked, what may differ, what is matched, what decides."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    renamed: ClassVar[dict[str, str]] = {"jobs": "concurrent_runs"}

    name: str = Field(pattern=NAME_PATTERN)
    question: str = Field(min_length=1)
    base: str
    """Run TOML that all arms start from, relative to the comparison file."""
    common: dict[str, Any] = {}
    """What every arm, the baseline included, sets over the base."""
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    """Arm -> what it sets over the base; nested tables and dotted keys mean the same, merged leaf by leaf."""
    baseline: str
    vary: tuple[str, ...] = Field(min_length=1)
    """Dotted keys in which arms may differ; a table's key covers all below it."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    match: Literal["tokens", "train_flops"] = "tokens"
    """train_flops: the number of steps of each arm is solved for the baseline's training FLOPs, and its
    schedule stretched to them (pretrain/comparison/matched_flops.py)."""
    deciding_metric: Literal["eval/causal/loss", "eval/loss"] = "eval/causal/loss"
    """Held-out loss at the last step, per modality. eval/causal/loss: of an arm that looks at later tokens in
    choosing which of them run, the loss of its causal form; of any other its eval/loss. eval/loss: each
    arm's under its own rule, which flatters one that looks ahead."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    concurrent_runs: PositiveInt = 1
    """Runs at a time, on this machine or of an array of Slurm jobs."""
    threads_per_run: PositiveInt | None = None
    """None: CPU cores / (concurrent_runs x processes_per_run)."""
    processes_per_run: PositiveInt = 1
    """Of `motley compare`, on this machine; of `motley submit` the profile says how many ranks a run has."""
    tuning: str | None = None
    """How learning rate and the like were chosen, with which budget per arm; printed in the report."""

    @model_validator(mode="after")
    def _check(self) -> "CompareConfig":
        if self.baseline not in self.arms:
            raise ValueError(f'baseline = "{self.baseline}" is no arm; arms: {", ".join(self.arms)}')
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds = {list(self.seeds)} names a seed twice; equal seeds give equal runs")
        for arm in self.arms:
            if not re.fullmatch(NAME_PATTERN, arm):
                raise ValueError(f'arms."{arm}": it names folders; use letters, digits, "_", "-" and "."')
        for key in self.vary:
            for fixed in (*SET_BY_COMPARISON, *SET_BY_MATCH):
                if _covers(key, fixed) or _covers(fixed, key):
                    why = (
                        "the comparison sets it"
                        if fixed in SET_BY_COMPARISON
                        else f'match = "{self.match}" holds it equal in all arms'
                    )
                    raise ValueError(f'vary names "{key}", but {why}; take it out of `vary`')
        return self


@dataclass(frozen=True)
class PlannedRun:
    arm: str
    seed: int
    config: RunConfig

    @property
    def name(self) -> str:
        return self.config.name


@dataclass(frozen=True)
class ComparisonPlan:
    """The comparison and all its runs, seed by seed and, within a seed, in the order of the arms."""

    path: Path
    """The comparison file."""
    overrides: tuple[str, ...]
    config: CompareConfig
    runs: tuple[PlannedRun, ...]

    @property
    def directory(self) -> Path:
        return Path(self.runs[0].config.runs_dir)

    @property
    def arms(self) -> tuple[str, ...]:
        """The baseline first, then the others in the file's order."""
        return (self.config.baseline, *self.others)

    @property
    def others(self) -> tuple[str, ...]:
        return tuple(arm for arm in self.config.arms if arm != self.config.baseline)

    def run(self, arm: str, seed: int) -> PlannedRun:
        return next(run for run in self.runs if (run.arm, run.seed) == (arm, seed))


class PlanRecord(BaseModel):
    """comparison.json: the resolved plan, written before anything runs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    comparison: CompareConfig
    runs: dict[str, RunConfig]


def is_comparison(path: str | Path) -> bool:
    """Whether a TOML file is a comparison and no run: it has arms. Raises ConfigError where it cannot be
    read."""
    return "arms" in load_toml(path)


def make_plan(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonPlan:
    """Read a comparison and resolve all its runs. Raises ConfigError before anything is written.

    `overrides` set keys of the base run of every arm; `comparison.seeds=[1]` and the like set the
    comparison's own.
    """
    path = Path(path)
    values = load_toml(path)
    own = [o.removeprefix("comparison.") for o in overrides if o.startswith("comparison.")]
    for override in own:
        apply_override(values, override)
    config = validate(CompareConfig, values, source=str(path))
    base_path = path.parent / config.base
    base = load_toml(base_path)
    for key, value in _leaves(config.common):
        set_key(base, key, value)
    for override in overrides:
        if override.startswith("comparison."):
            continue
        key = override.partition("=")[0].strip()
        _refuse_clash(config, key, source=f'override "{override}"')
        apply_override(base, override)
    runs = tuple(
        _resolve_run(config, base, arm, seed, source=f'{base_path} with {path}: arms."{arm}"')
        for seed in config.seeds
        for arm in config.arms
    )
    plan = ComparisonPlan(path=path, overrides=tuple(overrides), config=config, runs=runs)
    _check_arms(plan)
    if config.match == "tokens":
        return plan
    configs = matched([(run.arm, run.config) for run in runs], config.baseline, str(path))
    runs = tuple(replace(run, config=found) for run, found in zip(runs, configs, strict=True))
    return replace(plan, runs=runs)


def _refuse_clash(config: CompareConfig, key: str, *, source: str) -> None:
    if key in SET_BY_COMPARISON:
        hint = "comparison.seeds=[1, 2]" if key == "seed" else "comparison.name=..."
        raise ConfigError(f"{source}: the comparison sets {key} of every run; use {hint}")
    for arm, table in config.arms.items():
        if any(_covers(key, leaf) or _covers(leaf, key) for leaf, _ in _leaves(table)):
            raise ConfigError(
                f'{source}: arm "{arm}" sets "{key}" itself, so change it in the comparison file'
            )


def _resolve_run(
    config: CompareConfig, base: Mapping[str, Any], arm: str, seed: int, *, source: str
) -> PlannedRun:
    values = copy.deepcopy(dict(base))
    for key, value in _leaves(config.arms[arm]):
        if not any(_covers(allowed, key) for allowed in config.vary):
            near = difflib.get_close_matches(key, config.vary, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ConfigError(
                f'{source} sets "{key}", but `vary` = {list(config.vary)}{hint}; add it to `vary`, '
                "or move it to the base so that all arms have it"
            )
        set_key(values, key, value)
    values["name"], values["seed"] = f"{arm}_seed{seed}", seed
    values["runs_dir"] = str(
        Path(values.get("runs_dir", RunConfig.model_fields["runs_dir"].default)) / config.name
    )
    return PlannedRun(arm=arm, seed=seed, config=validate(RunConfig, values, source=source))


def _check_arms(plan: ComparisonPlan) -> None:
    """Arms may differ in what `vary` names and must differ from the baseline."""
    seed = plan.config.seeds[0]
    baseline = plan.run(plan.config.baseline, seed).config
    known = _dotted_keys(baseline.model_dump(mode="json"))
    for key in plan.config.vary:
        if not any(_covers(key, k) or _covers(k, key) for k in known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            raise ConfigError(f'{plan.path}: vary: "{key}" is no key of a run{hint}')
    if baseline.data.heldout is None:
        raise ConfigError(
            f"{plan.path}: {plan.config.deciding_metric} decides, but data.heldout is missing in "
            f"{plan.config.base}; name a folder of held-out token shards there"
        )
    for arm in plan.arms:
        if plan.config.deciding_metric == "eval/loss" or plan.run(arm, seed).config.model.has_causal_form:
            continue
        raise ConfigError(
            f'{plan.path}: eval/causal/loss decides, but arms."{arm}" has no causal form: a softmax gate of '
            'depth sees the whole document; give it another gate, or set deciding_metric = "eval/loss" and '
            "compare what cannot write"
        )
    for arm in plan.others:
        found = [d for d in differences(plan.run(arm, seed).config, baseline) if d[0] != "name"]
        if not found:
            raise ConfigError(f'{plan.path}: arms."{arm}" is the baseline again; equal arms give equal runs')
        outside = [d for d in found if not any(_covers(allowed, d[0]) for allowed in plan.config.vary)]
        if outside:
            listed = "; ".join(f"{key} = {ours!r} against {theirs!r}" for key, ours, theirs in outside)
            raise ConfigError(
                f'{plan.path}: arms."{arm}" differs from "{plan.config.baseline}" outside `vary`: {listed}'
            )


def _covers(allowed: str, key: str) -> bool:
    return key == allowed or key.startswith(allowed + ".")


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _dotted_keys(table: Mapping[str, Any]) -> list[str]:
    return [key for key, _ in _leaves(table)]


# ------------------------------------------------------------------------------------------- comparison.json


def record_of(plan: ComparisonPlan) -> PlanRecord:
    return PlanRecord(comparison=plan.config, runs={run.name: run.config for run in plan.runs})


def write_plan(plan: ComparisonPlan) -> None:
    """Write comparison.json; raises ConfigError if the directory was made by another plan."""
    target = plan.directory / PLAN
    ours = record_of(plan)
    if target.exists():
        check_same_plan(plan)
    elif plan.directory.exists() and any(plan.directory.glob(f"*/{METRICS}")):
        raise ConfigError(
            f"{plan.directory}: holds runs but no comparison.json, so it was not made by a comparison; "
            f"move it away, or choose another name in {plan.path}"
        )
    plan.directory.mkdir(parents=True, exist_ok=True)
    write_json(target, ours.model_dump(mode="json"))


def check_same_plan(plan: ComparisonPlan) -> None:
    """Raise ConfigError, listing what differs outside EXECUTION, unless comparison.json is of this plan."""
    target = plan.directory / PLAN
    try:
        values = json.loads(target.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{target}: no such file: nothing has run yet; leave out --report-only to start the comparison"
        ) from None
    except ValueError as error:
        raise ConfigError(
            f"{target}: not valid JSON ({error}); move {plan.directory} away and start again"
        ) from None
    ours, theirs = record_of(plan), validate(PlanRecord, values, source=str(target))
    lines = [f"  run {name}: only there" for name in theirs.runs.keys() - ours.runs.keys()]
    lines += [f"  run {name}: only in {plan.path.name}" for name in ours.runs.keys() - theirs.runs.keys()]
    pairs = [("comparison", ours.comparison, theirs.comparison)]
    pairs += [(name, ours.runs[name], theirs.runs[name]) for name in ours.runs if name in theirs.runs]
    lines += [
        f"  {where}.{key}: {now!r} in {plan.path.name}, {then!r} there"
        for where, mine, written in pairs
        for key, now, then in differences(mine, written)
        if not (where == "comparison" and key in EXECUTION)
    ]
    if lines:
        more = [f"  ... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise ConfigError(
            f"{plan.directory}: made by another plan of this name:\n"
            + "\n".join(sorted(lines[:SHOWN]) + more)
            + "\nGive the comparison another name, or move that directory away."
        )
