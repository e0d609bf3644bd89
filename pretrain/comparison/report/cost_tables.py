"""The tables of a report on what arms are, cost and used. This module imports no torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pretrain.comparison.costs import ArmSystem, step_time_ratio, systems
from pretrain.comparison.findings import Findings
from pretrain.comparison.foreign.question import ForeignPlan
from pretrain.comparison.report.tables import WIDE, Table
from pretrain.comparison.verdict import ratio_text
from pretrain.config import RunConfig, differences
from pretrain.models import accounting
from pretrain.models.config import ModelConfig
from pretrain.quantities import count, duration, flops, format_bytes, percent, with_prefix


def design_table(findings: Findings) -> Table:
    """The design of every arm, and all config keys in which arms differ, as far as they are known."""
    plan, cost = findings.plan, systems(findings)
    rows: dict[str, list[str]] = {}

    def row(label: str, value: Callable[[str], Any]) -> None:
        rows[label] = [str(value(arm)) for arm in plan.arms]

    if isinstance(plan, ForeignPlan):
        if plan.sizes:
            row("size", lambda arm: count(plan.sizes[arm]) if arm in plan.sizes else "n/a")
        row("steps", lambda arm: f"{max(run.planned.num_steps for run in findings.runs(arm)):,}")
    else:
        rows |= _model_rows(findings, plan.run_configs, cost)
    row("training tokens", lambda arm: count(cost[arm].tokens))
    row("training FLOPs in all", lambda arm: flops(cost[arm].train_flops))
    if any(cost[arm].flops_lost_to_spikes for arm in plan.arms):
        row("of these in steps lost to spikes", lambda arm: flops(cost[arm].flops_lost_to_spikes))
    row("seeds", lambda arm: ", ".join(str(run.seed) for run in findings.runs(arm)))
    row("time in training steps", lambda arm: duration(cost[arm].train_s))
    return Table(plan.arms, tuple((label, tuple(cells)) for label, cells in rows.items() if _known(cells)))


def _known(cells: Sequence[str]) -> bool:
    """Whether a row tells anything."""
    return any(cell not in ("n/a", "none", "") for cell in cells)


def _model_rows(
    findings: Findings, configs: Mapping[str, RunConfig], cost: Mapping[str, ArmSystem]
) -> dict[str, list[str]]:
    """The rows of a design that configs tell: the model, its training and the keys in which arms differ."""
    rows: dict[str, list[str]] = {}

    def row(label: str, value: Callable[[RunConfig], Any]) -> None:
        rows[label] = [str(value(config)) for config in configs.values()]

    row("towers", _towers)
    row(
        "untied per tower",
        lambda c: ", ".join(c.model.untied) if len(c.model.tower_names) > 1 else "one tower",
    )
    row("layers, width, heads", lambda c: f"{c.model.num_layers}, {c.model.d_model}, {c.model.num_heads}")
    row("parameters", lambda c: count(accounting.total_parameters(c.model)))
    row("active per token", lambda c: _per_modality(c, accounting.active_parameters, count))
    row("forward FLOPs per token *", lambda c: _per_modality(c, _linear_flops, flops))
    rows["training FLOPs per target **"] = [flops(cost[arm].flops_per_target) for arm in configs]

    def steps(config: RunConfig) -> int:
        return int(findings.scope.share * config.num_steps)

    row("steps x tokens per step", lambda c: f"{steps(c):,} x {c.tokens_per_step:,}")
    row("learning rate", _learning_rate)
    row("precision", lambda c: c.precision)
    base, *_ = configs.values()
    keys = {key for c in configs.values() for key, *_ in differences(c, base) if key not in ("name", "seed")}
    for key in sorted(keys):
        if not key.startswith("model.towers."):  # the first row shows the towers
            row(key, lambda c, key=key: _at(c, key))
    return rows


def _towers(config: RunConfig) -> str:
    """The modalities of every tower: "text | image + speech"."""
    names = config.model.tower_names
    if len(names) == 1:
        return "one for all modalities"
    members = {name: [m for m, tower in config.model.towers.items() if tower == name] for name in names}
    return " | ".join(" + ".join(group) for group in members.values())


def _linear_flops(model: ModelConfig, modality: str) -> int:
    return sum(accounting.flops_per_token(model, modality).values())


def _per_modality(
    config: RunConfig, value_of: Callable[[ModelConfig, str], int], text: Callable[[float], str]
) -> str:
    """A value per modality as text; just one text if all modalities have the same."""
    values = {m: text(value_of(config.model, m)) for m in config.model.modalities}
    if len(set(values.values())) == 1:
        return next(iter(values.values()))
    return ", ".join(f"{m} {value}" for m, value in values.items())


def _learning_rate(config: RunConfig) -> str:
    schedule = config.optimizer.schedule
    shape = (
        schedule.kind if schedule.kind == "constant" else f"{schedule.kind} to {percent(schedule.min_factor)}"
    )
    return f"{config.optimizer.learning_rate:g}, {schedule.warmup_steps} steps of warm-up, {shape}"


def _at(config: RunConfig, dotted_key: str) -> Any:
    """The value of a dotted key; "" if the config has no such key."""
    value: Any = config.model_dump(mode="json")
    for part in dotted_key.split("."):
        value = value.get(part, "") if isinstance(value, Mapping) else ""
    return value


def system_table(findings: Findings) -> Table:
    """The cost of running the arms: time, memory, utilisation."""
    plan, cost = findings.plan, systems(findings)
    ratios = {arm: step_time_ratio(findings, arm) for arm in plan.others}

    def step_time(arm: str) -> str:
        if arm == plan.config.baseline:
            return "1" if any(ratios.values()) else "n/a"
        estimate = ratios[arm]
        return ratio_text(estimate) if estimate else "n/a"

    def cells(value: Any) -> tuple[str, ...]:
        return tuple(value(cost[arm]) for arm in plan.arms)

    rows: Sequence[tuple[str, tuple[str, ...]]] = (
        ("time of a step (median)", cells(lambda s: _milliseconds(s.step_s))),
        (f"its ratio to {plan.config.baseline}", tuple(step_time(arm) for arm in plan.arms)),
        (
            "tokens per second",
            cells(lambda s: with_prefix(s.tokens_per_s, short=True)),
        ),
        (
            "model FLOPs utilisation",
            cells(lambda s: percent(s.mfu_frac, 1) if s.mfu_frac is not None else "n/a"),
        ),
        ("peak memory", cells(lambda s: format_bytes(s.peak_bytes))),
        ("waiting for data", cells(lambda s: percent(s.wait_frac, 1))),
        ("time in training steps", cells(lambda s: duration(s.train_s))),
    )
    return _by_arm(plan.arms, rows)


def _milliseconds(seconds: float) -> str:
    return f"{with_prefix(1e3 * seconds)} ms" if math.isfinite(seconds) else "n/a"


def _by_arm(arms: tuple[str, ...], rows: Sequence[tuple[str, tuple[str, ...]]]) -> Table:
    """A table of the rows that tell anything; of many arms a row each."""
    table = Table(arms, tuple(row for row in rows if _known(row[1])))
    return table.transposed() if len(arms) > WIDE else table


def data_table(findings: Findings) -> Table:
    """The data that every arm used, and what of it and of its compute was lost."""
    plan, cost, scope = findings.plan, systems(findings), findings.scope

    def unreadable(arm: str) -> str:
        return f"{sum(len(run.unreadable) for run in findings.runs(arm)):,}"

    def lost(arm: str, metric: str) -> float:
        return sum(run.lost(metric, until=scope.until(run)) for run in findings.runs(arm))

    def cells(value: Callable[[str], str]) -> tuple[str, ...]:
        return tuple(value(arm) for arm in plan.arms)

    def ended(arm: str, *kinds: str) -> str:
        return str(sum(scope.ends[run.name].kind in kinds for run in plan.runs if run.arm == arm))

    ours = not isinstance(plan, ForeignPlan)
    rows: list[tuple[str, tuple[str, ...]]] = [
        ("runs that finished", cells(lambda arm: ended(arm, "finished"))),
        ("runs that failed or diverged", cells(lambda arm: ended(arm, "failed", "diverged"))),
        ("runs not finished", cells(lambda arm: ended(arm, "unfinished"))),
        ("tokens a run", cells(lambda arm: count(cost[arm].tokens))),
        ("slots that hold a token", cells(lambda arm: percent(cost[arm].fill_frac, 1))),
        (
            "passes over the data",
            cells(lambda arm: f"{cost[arm].epochs:.2f}" if math.isfinite(cost[arm].epochs) else "n/a"),
        ),
    ]
    if ours:
        rows += [
            ("documents that could not be read, all runs", cells(unreadable)),
            ("steps lost to spikes, all runs", cells(lambda arm: f"{lost(arm, 'train/lost_steps'):,.0f}")),
            ("FLOPs lost to spikes, all runs", cells(lambda arm: flops(lost(arm, "compute/lost_flops")))),
        ]
    return _by_arm(plan.arms, rows)


def provenance(findings: Findings) -> tuple[tuple[str, str], ...]:
    """(label, value) of commit, device, versions and the like; several values where runs differ."""
    attempts = [attempt for run in findings.results for attempt in run.record.get("attempts", [])]
    if not attempts:
        return ()

    def values(pick: Any) -> str:
        return "; ".join(
            dict.fromkeys(str(value) for a in attempts if (value := pick(a)) not in (None, "", {}))
        )

    layouts = values(lambda a: ", ".join(f"{k} {v}" for k, v in a.get("layout", {}).items()))
    versions = values(lambda a: ", ".join(f"{k} {v}" for k, v in a.get("versions", {}).items()))
    edited = " (with changes that were not committed; each run's record.json holds their hash)"
    rows = (
        (
            "commit",
            values(lambda a: a.get("commit")) + (edited if any(a.get("diff") for a in attempts) else ""),
        ),
        ("device", values(lambda a: a.get("device"))),
        ("processor", values(lambda a: a.get("processor"))),
        ("arithmetic path", values(lambda a: a.get("arithmetic"))),
        ("layout", layouts),
        ("versions", versions),
        ("first run started", min(str(a.get("started", "")) for a in attempts)),
        ("attempts", f"{len(attempts)} for {len(findings.results)} runs"),
    )
    return tuple((label, value) for label, value in rows if value)
