"""The tables of a report: findings as rows and columns of text. This module imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.contrasts import difference_text
from pretrain.comparison.curve_pairs import Matching
from pretrain.comparison.effects import Effect
from pretrain.comparison.findings import (
    ALL,
    ArmLoss,
    Findings,
    conditional_gain_name,
    conditional_loss_name,
)
from pretrain.comparison.units import units_of
from pretrain.comparison.verdict import named_effects, outcome_text, ratio_text, slope_text
from pretrain.quantities import percent, signed


@dataclass(frozen=True)
class Table:
    """A table of text. A row is a label and one cell per column; `corner` heads the labels."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    corner: str = ""

    def transposed(self) -> "Table":
        """The table with a row for every column."""
        labels = tuple(label for label, _ in self.rows)
        cells = zip(*(cells for _, cells in self.rows), strict=True)
        return Table(labels, tuple(zip(self.columns, cells, strict=True)), self.corner)


WIDE = 4
"""Number of arms above which a table has a row for every arm and not a column."""


def loss_table(findings: Findings) -> dict[str, Table]:
    """By arm, the table of its final held-out losses and the baseline's, with difference and interval."""
    base = findings.plan.config.baseline
    out = {}
    for arm in findings.plan.others:
        rows = []
        for modality in findings.outcomes:
            final = findings.contrast(arm, modality).final
            cells = (
                loss_text(findings.losses[base, modality]),
                loss_text(findings.losses[arm, modality]),
                signed(final.estimate),
                _interval_text(final),
                f"{signed(100 * final.relative, 2)} %",
            )
            rows.append((_outcome_name(modality), cells))
        columns = (base, arm, "difference", _interval_heading(findings), "relative")
        out[arm] = Table(columns, tuple(rows), "final held-out loss")
    return out


def _outcome_name(modality: str) -> str:
    return "all targets" if modality == ALL else modality


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
            cells = (
                text,
                outcome_text(findings, effect),
                signed(effect.estimate),
                _interval_text(effect),
                f"{signed(100 * effect.relative, 2)} %",
            )
            rows.append((f"{name}, {_outcome_name(effect.modality)}", cells))
    columns = ("contrast", "outcome", "difference", _interval_heading(findings), "relative")
    return Table(columns, tuple(rows), "final held-out loss") if rows else None


def overview_table(findings: Findings) -> Table:
    """The final held-out losses of all arms, with their relative differences to the baseline.

    A * marks a verdict: better or worse than the baseline.
    """
    columns = findings.outcomes

    def cell(arm: str, modality: str) -> str:
        text = loss_text(findings.losses[arm, modality])
        if arm == findings.plan.config.baseline:
            return text
        contrast = findings.contrast(arm, modality)
        mark = " *" if contrast.winner else ""
        return f"{text}, {signed(100 * contrast.final.relative, 1)} %{mark}"

    rows = ((arm, tuple(cell(arm, m) for m in columns)) for arm in findings.plan.arms)
    return Table(tuple(_outcome_name(m) for m in columns), tuple(rows), "final held-out loss")


def rule_table(findings: Findings) -> Table | None:
    """For arms that look ahead, the loss that was compared and the loss under the rule of training.

    None if no arm looks ahead.
    """
    arms = tuple(dict.fromkeys(arm for arm, _ in findings.by_rule))
    if not arms:
        return None
    names = [_outcome_name(m) for m in findings.outcomes]
    rows = []
    for arm in arms:
        for label, losses in (
            (f"{arm}, as compared", findings.losses),
            (f"{arm}, own rule", findings.by_rule),
        ):
            rows.append((label, tuple(loss_text(losses[arm, m]) for m in findings.outcomes)))
    return Table(tuple(names), tuple(rows), "final held-out loss")


def loss_text(loss: ArmLoss) -> str:
    """The mean over the seeds, with the standard deviation if there is one."""
    return f"{loss.mean:.3f}" + (f" \u00b1 {loss.deviation:.3f}" if loss.deviation is not None else "")


def matching_table(findings: Findings, arm: str) -> Table:
    """s and the end-point ratio of an arm per modality, along all axes that are known."""
    first = findings.progress_axis
    axes = [axis for axis in (first, "flops", "seconds") if axis in findings.axes]
    rows = []
    for modality in findings.modalities:
        matching = findings.contrast(arm, modality).matching
        cells = [slope_text(matching[axis]) for axis in axes] + [_end_text(matching[axis]) for axis in axes]
        cells.append(percent(matching[first].never_reached_frac))
        rows.append((modality, tuple(cells)))
    names = ["FLOPs" if axis == "flops" else axis for axis in axes]
    columns = (*(f"s, {name}" for name in names), *(f"end point, {name}" for name in names), "never reached")
    return Table(columns, tuple(rows), "ratio to the baseline")


def _end_text(matching: Matching) -> str:
    if matching.end is None:
        return "none"
    mark = "" if matching.end_reached else " *"
    return ratio_text(matching.end) + mark


def conditional_table(findings: Findings) -> Table | None:
    """By arm, the loss of b after its own a, and its gain over a foreign a, per direction; None if not
    measured."""
    if not findings.directions:
        return None

    def cells(arm: str) -> tuple[str, ...]:
        texts = []
        for direction in findings.directions:
            texts.append(loss_text(findings.conditional[arm, conditional_loss_name(direction)]))
            texts.append(_signed_loss(findings.conditional[arm, conditional_gain_name(direction)]))
        return tuple(texts)

    names = [" \u2192 ".join(direction) for direction in findings.directions]
    columns = tuple(f"{name}, {kind}" for name in names for kind in ("loss", "gain"))
    units = units_of(findings.plan, dict.fromkeys(b for _, b in findings.directions))
    table = Table(columns, tuple((arm, cells(arm)) for arm in findings.plan.arms), units)
    return table if len(findings.plan.arms) > WIDE else table.transposed()


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
