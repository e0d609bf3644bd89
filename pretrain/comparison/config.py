"""A comparison file becomes the plan of its runs, which is checked before they start.

This module imports no torch.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_pipeline.files.nearest_word import did_you_mean
from data_pipeline.files.toml_config import ConfigError, apply_override, load_toml, set_key, validate
from pretrain.comparison.compare_config import RATE_KEY, SET_BY_COMPARISON, CompareConfig
from pretrain.comparison.ladder_config import BudgetConfig, Cell, cells_of, run_keys
from pretrain.comparison.leaves import dotted_keys, leaves
from pretrain.comparison.matched_flops import expected_mix, match_flops, step_flops
from pretrain.comparison.plan import ComparisonPlan, PlannedRun
from pretrain.comparison.run_length import with_steps
from pretrain.comparison.solved_size import Solve, solve_size
from pretrain.config import RunConfig, differences
from pretrain.dotted_keys import covers


def is_comparison(path: str | Path) -> bool:
    """Whether a TOML file is a comparison (it has arms) and not a run. Raises ConfigError for a bad file."""
    return "arms" in load_toml(path)


def make_plan(path: str | Path, overrides: Sequence[str] = ()) -> ComparisonPlan:
    """Read a comparison and resolve all its runs. Raises ConfigError before anything is written.

    `overrides` set keys of the base run, and so of every arm; overrides such as `comparison.seeds=[1]` set
    keys of the comparison itself.
    """
    path = Path(path)
    values = load_toml(path)
    own = [o.removeprefix("comparison.") for o in overrides if o.startswith("comparison.")]
    for override in own:
        apply_override(values, override)
    config = validate(CompareConfig, values, source=str(path))
    base_path = path.parent / config.base
    base = load_toml(base_path)
    for key, value in leaves(config.common):
        set_key(base, key, value)
    for override in overrides:
        if override.startswith("comparison."):
            continue
        key = override.partition("=")[0].strip()
        _refuse_clash(config, key, source=f'override "{override}"')
        apply_override(base, override)
    plan = ComparisonPlan(path=path, overrides=tuple(overrides), config=config, runs=())
    source = f"{base_path} with {path}"
    if config.budgets is None:
        plan = _resolve_runs(plan, base, source=source)
    else:
        plan = _ladder(plan, base, config.budgets, source=source)
    return _after_first_runs(plan)


def _after_first_runs(plan: ComparisonPlan) -> ComparisonPlan:
    """The plan with the lengths of its runs, and with what runs that come first have found, or with these."""
    by_seconds = plan.config.match == "seconds"
    if not by_seconds:
        plan = _all_matched(plan)
    if plan.config.rounds:
        from pretrain.comparison.step_timing import with_timing  # scipy; it reads results

        plan = with_timing(plan)
        if plan.first:
            return plan
    if by_seconds:
        plan = _all_matched(plan)
    if plan.config.rates:
        from pretrain.comparison.rate_grid import with_rates  # numpy; it reads results

        return with_rates(plan)
    return plan


def _all_matched(plan: ComparisonPlan) -> ComparisonPlan:
    """The plan whose arms spend equal budgets, in every cell of a ladder."""
    parts = plan.cells.values() or (plan,)
    matched = {run.name: run for part in parts for run in _matched(part).runs}
    return replace(plan, runs=tuple(matched[run.name] for run in plan.runs))


def _resolve_runs(plan: ComparisonPlan, base: Mapping[str, Any], *, source: str) -> ComparisonPlan:
    """The plan with all runs of arms and seeds at the length of the base. Raises ConfigError for an arm that
    cannot be compared."""
    config = plan.config
    grid = [(arm, seed) for seed in config.seeds for arm in config.arms]
    grid += [(config.baseline, seed) for seed in config.extra_baseline_seeds]
    runs = tuple(
        _resolve_run(config, base, arm, seed, source=f'{source}: arms."{arm}"') for arm, seed in grid
    )
    plan = replace(plan, runs=runs)
    _check_arms(plan)
    return plan


def _matched(plan: ComparisonPlan) -> ComparisonPlan:
    """The plan of one size and budget whose arms spend equal budgets."""
    if plan.config.match == "tokens":
        return plan
    if plan.config.solve is not None:
        return _solved(plan, plan.config.solve)
    if plan.config.match == "seconds":
        from pretrain.comparison.step_timing import match_seconds

        configs = match_seconds(plan)
    else:
        runs_of_arms = [(run.arm, run.config) for run in plan.runs]
        configs = match_flops(runs_of_arms, plan.config.baseline, str(plan.path))
    runs = (replace(run, config=matched) for run, matched in zip(plan.runs, configs, strict=True))
    return replace(plan, runs=tuple(runs))


def _solved(plan: ComparisonPlan, solve: Solve) -> ComparisonPlan:
    """The plan whose arms have the sizes at which a step costs the FLOPs of the baseline's."""
    seed, source = plan.seeds[0], str(plan.path)
    base = plan.run(plan.config.baseline, seed).config
    mix = expected_mix(base)
    found = {
        arm: solve_size(arm, plan.run(arm, seed).config, base, mix, solve, source=source)
        for arm in plan.others
    }
    runs = []
    for run in plan.runs:  # the runs of an arm differ in their seed alone
        if run.arm in found:
            config, solved = found[run.arm]
            run = replace(run, config=run.config.model_copy(update={"model": config.model}), solved=solved)
        runs.append(run)
    return replace(plan, runs=tuple(runs))


def _ladder(
    plan: ComparisonPlan, base: Mapping[str, Any], budgets: BudgetConfig, *, source: str
) -> ComparisonPlan:
    """The plan of a ladder: arms and seeds at every size and budget."""
    runs: list[PlannedRun] = []
    for size, table in plan.config.sizes.items():
        values = copy.deepcopy(dict(base))
        for key, value in leaves(run_keys(table)):
            set_key(values, key, value)
        of_size = _resolve_runs(plan, values, source=f'{source}: sizes."{size}"')
        baseline = of_size.run(plan.config.baseline, plan.config.seeds[0]).config
        for cell in cells_of(size, table, baseline, budgets, _expected_step_flops):
            in_cell = tuple(_in_cell(run, cell, source=source) for run in of_size.runs)
            runs += in_cell
    seeds = (*plan.config.seeds, *plan.config.extra_baseline_seeds)
    runs.sort(key=lambda run: seeds.index(run.seed))  # stable: cells and arms keep their order
    return replace(plan, runs=tuple(runs))


def _expected_step_flops(config: RunConfig) -> Fraction:
    """Training FLOPs of a step of a run, for the average token of its training data."""
    return step_flops(config, expected_mix(config))


def _in_cell(run: PlannedRun, cell: Cell, *, source: str) -> PlannedRun:
    """The run of a size, stretched to the budget of a cell and named after the cell."""
    config = run.config
    steps = cell.tokens // config.tokens_per_step
    where = f"{source}: {cell.name}, {steps} steps"
    stretched = with_steps(config, steps, config.num_steps, source=where, intervals=True)
    named = stretched.model_copy(update={"name": f"{cell.name}_{config.name}"})
    return replace(run, config=named, cell=cell)


def _refuse_clash(config: CompareConfig, key: str, *, source: str) -> None:
    """Raise ConfigError for an override of a key that the comparison or one of its arms sets."""
    if key in SET_BY_COMPARISON:
        hint = "comparison.seeds=[1, 2]" if key == "seed" else "comparison.name=..."
        raise ConfigError(f"{source}: the comparison sets {key} of every run; use {hint}")
    if config.rates and covers(key, RATE_KEY):
        raise ConfigError(f"{source}: `rates` decides {RATE_KEY} of every run; use comparison.rates=[...]")
    if key == "total_tokens" and config.budgets is not None:
        raise ConfigError(f"{source}: `budgets` sets total_tokens of every run; use comparison.budgets.*")
    tables = [(f'arm "{arm}"', table) for arm, table in config.arms.items()]
    tables += [(f'size "{size}"', table) for size, table in config.sizes.items()]
    for name, table in tables:
        if any(covers(key, leaf) or covers(leaf, key) for leaf, _ in leaves(table)):
            raise ConfigError(f'{source}: {name} sets "{key}" itself, so change it in the comparison file')


def _resolve_run(
    config: CompareConfig, base: Mapping[str, Any], arm: str, seed: int, *, source: str
) -> PlannedRun:
    """The run of an arm and a seed. Raises ConfigError if the arm sets a key outside `vary`."""
    values = copy.deepcopy(dict(base))
    for key, value in leaves(config.arms[arm]):
        if not any(covers(allowed, key) for allowed in config.vary):
            hint = did_you_mean(key, config.vary, cutoff=0.6)
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
    """Raise ConfigError unless all arms differ from the baseline, in keys of `vary` only."""
    seed = plan.config.seeds[0]
    baseline = plan.run(plan.config.baseline, seed).config
    known = dotted_keys(baseline.model_dump(mode="json"))
    for key in plan.config.vary:
        if not any(covers(key, k) or covers(k, key) for k in known):
            raise ConfigError(f'{plan.path}: vary: "{key}" is no key of a run{did_you_mean(key, known)}')
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
    for arm in plan.arms if plan.config.rates else ():
        if (own := plan.run(arm, seed).config.optimizer.muon.learning_rate) is not None:
            raise ConfigError(
                f'{plan.path}: rates = {list(plan.config.rates)} moves {RATE_KEY} alone, but arms."{arm}" or '
                f"the base gives matrices optimizer.muon.learning_rate = {own:g}; take it out"
            )
    if plan.config.budgets is not None:
        _check_evaluations(plan, baseline)
    for arm in plan.others:
        differing = [d for d in differences(plan.run(arm, seed).config, baseline) if d[0] != "name"]
        if not differing:
            raise ConfigError(f'{plan.path}: arms."{arm}" is the baseline again; equal arms give equal runs')
        outside = [d for d in differing if not any(covers(allowed, d[0]) for allowed in plan.config.vary)]
        if outside:
            listed = "; ".join(f"{key} = {ours!r} against {theirs!r}" for key, ours, theirs in outside)
            raise ConfigError(
                f'{plan.path}: arms."{arm}" differs from "{plan.config.baseline}" outside `vary`: {listed}'
            )


def _check_evaluations(plan: ComparisonPlan, baseline: RunConfig) -> None:
    """Raise ConfigError if the runs of a ladder evaluate what its report does not hold."""
    if baseline.evaluate.generate:
        raise ConfigError(
            f"{plan.path}: a ladder with evaluate.generate = {baseline.evaluate.generate}: its report has no "
            "place for facts, so take generate out, and judge them in a comparison of one size"
        )
