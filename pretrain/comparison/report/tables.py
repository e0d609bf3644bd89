"""The tables of a report: findings as rows and columns of text. This module imports no torch."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pretrain.comparison.contrasts import difference_text
from pretrain.comparison.costs import step_time_ratio, systems
from pretrain.comparison.effects import Effect
from pretrain.comparison.findings import (
    ALL,
    ArmLoss,
    Findings,
    Matching,
    conditional_gain_name,
    conditional_loss_name,
)
from pretrain.comparison.results import AXES
from pretrain.comparison.verdict import named_effects, outcome_text, ratio_text, slope_text
from pretrain.config import RunConfig, differences
from pretrain.models import accounting
from pretrain.models.config import ModelConfig
from pretrain.quantities import count, duration, flops, format_bytes, percent, signed, with_prefix


@dataclass(frozen=True)
class Table:
    """A table of text. A row is a label and one cell per column; `corner` heads the labels."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    corner: str = ""


def design_table(findings: Findings) -> Table:
    """The design and cost of every arm, and all config keys in which arms differ."""
    plan, cost = findings.plan, systems(findings)
    configs = {arm: plan.run(arm, findings.seeds[0]).config for arm in plan.arms}
    rows: dict[str, list[str]] = {}

    def row(label: str, value: Any) -> None:
        rows[label] = [str(value(arm, configs[arm])) for arm in plan.arms]

    row("towers", lambda _, c: _towers(c))
    row(
        "untied per tower",
        lambda _, c: ", ".join(c.model.untied) if len(c.model.tower_names) > 1 else "one tower",
    )
    row("layers, width, heads", lambda _, c: f"{c.model.num_layers}, {c.model.d_model}, {c.model.num_heads}")
    row("parameters", lambda _, c: count(accounting.total_parameters(c.model)))
    row("active per token", lambda _, c: _per_modality(c, accounting.active_parameters, count))
    row("forward FLOPs per token *", lambda _, c: _per_modality(c, _linear_flops, flops))
    row("training FLOPs per target **", lambda arm, _: flops(cost[arm].flops_per_target))

    def steps(config: RunConfig) -> int:
        return int(findings.scope.share * config.num_steps)

    row("training tokens", lambda _, c: count(steps(c) * c.tokens_per_step))
    row("steps x tokens per step", lambda _, c: f"{steps(c):,} x {c.tokens_per_step:,}")
    row("training FLOPs in all", lambda arm, _: flops(cost[arm].train_flops))
    if any(cost[arm].flops_lost_to_spikes for arm in plan.arms):
        row("of these in steps lost to spikes", lambda arm, _: flops(cost[arm].flops_lost_to_spikes))
    row("learning rate", lambda _, c: _learning_rate(c))
    row("precision", lambda _, c: c.precision)
    row("seeds", lambda arm, _: ", ".join(str(run.seed) for run in findings.runs(arm)))
    row("time in training steps", lambda arm, _: duration(cost[arm].train_s))
    row("tokens per second", lambda arm, _: count(cost[arm].tokens_per_s))
    base = configs[plan.config.baseline]
    keys = {key for c in configs.values() for key, *_ in differences(c, base) if key not in ("name", "seed")}
    for key in sorted(keys):
        if not key.startswith("model.towers."):  # the first row shows the towers
            row(key, lambda _, c, key=key: _at(c, key))
    return Table(plan.arms, tuple((label, tuple(cells)) for label, cells in rows.items()))


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


def loss_table(findings: Findings) -> dict[str, Table]:
    """By arm, the table of its final held-out losses and the baseline's, with difference and interval."""
    base = findings.plan.config.baseline
    out = {}
    for arm in findings.plan.others:
        rows = []
        for modality in (*findings.modalities, ALL):
            final = findings.contrast(arm, modality).final
            cells = (
                loss_text(findings.losses[base, modality]),
                loss_text(findings.losses[arm, modality]),
                signed(final.estimate),
                _interval_text(final),
                f"{signed(100 * final.relative, 2)} %",
            )
            rows.append(("all targets" if modality == ALL else modality, cells))
        columns = (base, arm, "difference", _interval_heading(findings), "relative")
        out[arm] = Table(columns, tuple(rows), "final held-out loss")
    return out


def _interval_heading(findings: Findings) -> str:
    return f"{percent(findings.plan.config.confidence)} interval"


def _interval_text(effect: Effect) -> str:
    """The interval of an effect; ** marks one that holds by itself and not jointly."""
    if effect.interval is None:
        return "none (an observation)"
    mark = "" if effect.primary else " **"
    return f"{signed(effect.interval.low)} to {signed(effect.interval.high)}{mark}"


def contrast_table(findings: Findings) -> Table | None:
    """The contrasts that the file names, a row per contrast and modality; None if it names none."""
    rows = []
    for name, effects in named_effects(findings):
        text = difference_text(findings.plan.config.differences[name])
        for effect in effects:
            modality = "all targets" if effect.modality == ALL else effect.modality
            cells = (
                text,
                outcome_text(findings, effect),
                signed(effect.estimate),
                _interval_text(effect),
                f"{signed(100 * effect.relative, 2)} %",
            )
            rows.append((f"{name}, {modality}", cells))
    columns = ("contrast", "outcome", "difference", _interval_heading(findings), "relative")
    return Table(columns, tuple(rows), "final held-out loss") if rows else None


def overview_table(findings: Findings) -> Table:
    """The final held-out losses of all arms, with their relative differences to the baseline.

    A * marks a verdict: better or worse than the baseline.
    """
    columns = (*findings.modalities, ALL)

    def cell(arm: str, modality: str) -> str:
        text = loss_text(findings.losses[arm, modality])
        if arm == findings.plan.config.baseline:
            return text
        contrast = findings.contrast(arm, modality)
        mark = " *" if contrast.winner else ""
        return f"{text}, {signed(100 * contrast.final.relative, 1)} %{mark}"

    rows = ((arm, tuple(cell(arm, m) for m in columns)) for arm in findings.plan.arms)
    return Table((*findings.modalities, "all targets"), tuple(rows), "final held-out loss")


def rule_table(findings: Findings) -> Table | None:
    """For arms that look ahead, the loss that was compared and the loss under the rule of training.

    None if no arm looks ahead.
    """
    arms = tuple(dict.fromkeys(arm for arm, _ in findings.by_rule))
    if not arms:
        return None
    names = ["all targets" if m == ALL else m for m in (*findings.modalities, ALL)]
    rows = []
    for arm in arms:
        for label, losses in (
            (f"{arm}, as compared", findings.losses),
            (f"{arm}, own rule", findings.by_rule),
        ):
            rows.append((label, tuple(loss_text(losses[arm, m]) for m in (*findings.modalities, ALL))))
    return Table(tuple(names), tuple(rows), "final held-out loss")


def loss_text(loss: ArmLoss) -> str:
    """The mean over the seeds, with the standard deviation if there is one."""
    return f"{loss.mean:.3f}" + (f" \u00b1 {loss.deviation:.3f}" if loss.deviation is not None else "")


def matching_table(findings: Findings, arm: str) -> Table:
    """s and the end-point ratio of an arm per modality, along steps, FLOPs and seconds."""
    rows = []
    for modality in findings.modalities:
        matching = findings.contrast(arm, modality).matching
        cells = [slope_text(matching[axis]) for axis in AXES]
        cells += [_end_text(matching[axis]) for axis in ("steps", "seconds")]
        cells.append(percent(matching["steps"].never_reached_frac))
        rows.append((modality, tuple(cells)))
    columns = (
        "s, steps",
        "s, FLOPs",
        "s, seconds",
        "end point, steps",
        "end point, seconds",
        "never reached",
    )
    return Table(columns, tuple(rows), "ratio to the baseline")


def _end_text(matching: Matching) -> str:
    if matching.end is None:
        return "none"
    mark = "" if matching.end_reached else " *"
    return ratio_text(matching.end) + mark


def conditional_table(findings: Findings) -> Table | None:
    """The loss of b after its own a, and the gain over a foreign a, per direction; None if not measured."""
    arms, rows = findings.plan.arms, []
    for direction in findings.directions:
        cells = [loss_text(findings.conditional[arm, conditional_loss_name(direction)]) for arm in arms]
        cells += [_signed_loss(findings.conditional[arm, conditional_gain_name(direction)]) for arm in arms]
        rows.append((" \u2192 ".join(direction), tuple(cells)))
    if not rows:
        return None
    columns = (*(f"loss, {arm}" for arm in arms), *(f"gain, {arm}" for arm in arms))
    return Table(columns, tuple(rows), "nats per token")


def fact_table(findings: Findings) -> Table | None:
    """Accuracies of facts by arm, differences to the baseline, chance and judge; None if not measured."""
    plan, rows = findings.plan, []
    for fact in findings.facts:
        direction, _, kind = fact.name.partition("/")
        cells = [_share_text(fact.accuracy[arm]) for arm in plan.arms]
        for arm in plan.others:
            effect = fact.effects[arm]
            text = signed(effect.estimate)
            if effect.interval is not None and effect.interval.low < effect.interval.high:
                text += f", {signed(effect.interval.low)} to {signed(effect.interval.high)}"
            cells.append(text)
        cells.append(", ".join(f"{share:.3f}" for share in fact.foreign.values()))
        cells.append("a rule" if fact.judge is None else f"{fact.judge:.3f}")
        label = f"{direction.replace('_to_', ' to ')}, {kind.replace('_', ' ')}"
        rows.append((label, tuple(cells)))
    if not rows:
        return None
    differences = (f"{arm} minus {plan.config.baseline}" for arm in plan.others)
    columns = (*plan.arms, *differences, f"by chance: {', '.join(plan.arms)}", "the judge itself")
    return Table(columns, tuple(rows), "share of 1")


def _share_text(shares: Sequence[float]) -> str:
    """The mean over the runs, with the standard deviation if there are several."""
    spread = f" \u00b1 {np.std(shares, ddof=1):.3f}" if len(shares) > 1 else ""
    return f"{np.mean(shares):.3f}{spread}"


def _signed_loss(loss: ArmLoss) -> str:
    return signed(loss.mean) + (f" \u00b1 {loss.deviation:.3f}" if loss.deviation is not None else "")


def system_table(findings: Findings) -> Table:
    """The cost of running the arms: time, memory, utilisation."""
    plan, cost = findings.plan, systems(findings)
    ratios = {arm: step_time_ratio(findings, arm) for arm in plan.others}

    def step_time(arm: str) -> str:
        if arm == plan.config.baseline:
            return "1"
        estimate = ratios[arm]
        return ratio_text(estimate) if estimate else "n/a"

    def cells(value: Any) -> tuple[str, ...]:
        return tuple(value(cost[arm]) for arm in plan.arms)

    rows: Sequence[tuple[str, tuple[str, ...]]] = (
        ("time of a step (median)", cells(lambda s: f"{with_prefix(1e3 * s.step_s)} ms")),
        (f"its ratio to {plan.config.baseline}", tuple(step_time(arm) for arm in plan.arms)),
        ("tokens per second", cells(lambda s: count(s.tokens_per_s))),
        (
            "model FLOPs utilisation",
            cells(lambda s: percent(s.mfu_frac, 1) if s.mfu_frac is not None else "n/a"),
        ),
        ("peak memory", cells(lambda s: format_bytes(s.peak_bytes))),
        ("waiting for data", cells(lambda s: percent(s.wait_frac, 1))),
        ("slots that hold a token", cells(lambda s: percent(s.fill_frac, 1))),
        ("passes over the data", cells(lambda s: f"{s.epochs:.2f}" if math.isfinite(s.epochs) else "n/a")),
    )
    return Table(plan.arms, tuple(rows))


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
