"""Effects in all cells of a ladder together: one residual variance per modality, and joint intervals.

A cell of two arms and three seeds leaves two degrees of freedom, with which intervals that hold together
over tens of verdicts are some twenty times as wide as the noise. So one fit per modality covers the runs of
all cells: every arm of every cell has its own mean, every seed of a cell its own effect, and all runs share
the residual variance. Where the runs of a size, a budget, an arm or a cell spread farther than the others,
their own variance counts if it makes an interval wider. The intervals of all primary contrasts in all cells
and modalities hold together. This module imports no torch.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from pretrain.comparison.contrasts import weights
from pretrain.comparison.document_variance import over_documents
from pretrain.comparison.effects import Effect, detectable_in, enough_runs
from pretrain.comparison.findings import ALL, Findings, final_losses
from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult
from pretrain.comparison.run_documents import paired_documents
from pretrain.comparison.simultaneous import (
    Array,
    Design,
    OverDocuments,
    design_over,
    fit,
    half_widths,
    local_level,
    outcome,
)
from pretrain.comparison.spread_groups import group_half_widths
from pretrain.comparison.statistics import Interval

Run = tuple[Cell, str, int]
"""Cell, arm and seed."""
Row = tuple[Cell, str]
"""Cell and name of a contrast."""


@dataclass(frozen=True)
class LadderFit:
    """The fit over all cells of a ladder that are decided."""

    effects: Mapping[Cell, Mapping[tuple[str, str], Effect]]
    """By cell, the effects by (contrast, modality or ALL); those of cells out of the fit have no interval."""
    deviation: Mapping[str, float]
    """By modality, the residual deviation over seeds, in nats per token; empty without a fit."""
    dof: int
    """Degrees of freedom of the residual variance; 0 without a fit."""
    num_verdicts: int
    """Number of intervals that hold together."""


def ladder_design(plan_of: Mapping[Cell, Plan], runs: list[Run], rows: list[Row]) -> Design:
    """The design of all runs of a ladder: an arm of a cell is an arm, and a seed of a cell a seed."""
    arms = list(dict.fromkeys((cell, arm) for cell, arm, _ in runs))
    seeds = list(dict.fromkeys((cell, seed) for cell, _, seed in runs))
    contrasts = [
        {(cell, arm): weight for arm, weight in weights(plan_of[cell].config.differences[name]).items()}
        for cell, name in rows
    ]
    in_cells = [((cell, arm), (cell, seed)) for cell, arm, seed in runs]
    return design_over(arms, seeds, in_cells, contrasts)


def ladder_effects(cells: Mapping[Cell, Findings], modalities: tuple[str, ...]) -> LadderFit:
    """The effects of all cells.

    Cells that are unfinished, or whose arms may have read different data, take no part in the fit, nor do
    arms of which every run diverged.
    """
    plans = {cell: findings.plan for cell, findings in cells.items()}
    kept = {cell: f for cell, f in cells.items() if not f.scope.interim and f.fingerprints.proven}
    results = [
        (cell, run) for cell, f in kept.items() for run in f.results if run.arm not in f.scope.diverged
    ]
    rows: list[Row] = [
        (cell, name)
        for cell, f in kept.items()
        for name, difference in f.plan.config.differences.items()
        if not set(weights(difference)) & set(f.scope.diverged)
    ]
    runs: list[Run] = [(cell, run.arm, run.seed) for cell, run in results]
    without = {cell: {k: _observation(e) for k, e in f.effects.items()} for cell, f in cells.items()}
    if not rows or (design := ladder_design(plans, runs, rows)).dof == 0:
        return LadderFit(without, {}, 0, 0)
    names = (*modalities, ALL)
    final = {cell: final_losses(f.results, f.losses) for cell, f in kept.items()}
    table = np.array([[final[cell][run.arm, run.seed, m] for cell, run in results] for m in names])
    primary = [name in kept[cell].plan.config.verdicts for cell, name in rows] & enough_runs(design)
    alpha = 1 - next(iter(kept.values())).plan.config.confidence
    arms = [(cell.size, cell.budget, arm) for cell, arm in dict.fromkeys((c, arm) for c, arm, _ in runs)]
    over = _over_documents(kept, results, rows, names)
    single = joint = ladder_half_widths(table, design, arms, alpha, over)
    if primary.any():
        verdicts = replace(design, weights=design.weights[primary])
        level = local_level(verdicts, alpha, len(modalities))
        joint = ladder_half_widths(table, design, arms, level, over)
    fitted = fit(table, design)
    effects = {cell: dict(of_cell) for cell, of_cell in without.items()}
    for r, (cell, name) in enumerate(rows):
        for o, modality in enumerate(names):
            before = kept[cell].effects[name, modality]
            is_verdict = bool(primary[r]) and modality != ALL
            half = float((joint if is_verdict else single)[o, r])
            base = kept[cell].losses[kept[cell].plan.config.baseline, modality].mean
            estimate = float(fitted.estimates[o, r])
            effects[cell][name, modality] = _decided(
                replace(before, estimate=estimate, relative=estimate / base, primary=is_verdict), half
            )
    deviation = dict(zip(names, map(float, fitted.deviation), strict=True))
    return LadderFit(effects, deviation, design.dof, int(primary.sum()) * len(modalities))


def _over_documents(
    cells: Mapping[Cell, Findings],
    results: Sequence[tuple[Cell, RunResult]],
    rows: Sequence[Row],
    names: Sequence[str],
) -> OverDocuments | None:
    """The variance over documents of the contrasts `rows`, by outcome; 0 in cells that were not judged by
    documents of their own, and None if no cell was. `results`: the runs of the fit."""
    variance = np.zeros((len(names), len(rows)))
    dof = np.full(len(names), np.iinfo(np.int64).max)
    for cell, findings in cells.items():
        runs = [run for of, run in results if of == cell]
        documents = None if findings.num_documents is None else paired_documents(runs, names, ALL)
        own = [r for r, (of, _) in enumerate(rows) if of == cell]
        if documents is None or not own:
            continue
        in_cell = [(cell, run.arm, run.seed) for run in runs]
        design = ladder_design({cell: findings.plan}, in_cell, [rows[r] for r in own])
        of_cell = over_documents([documents[name] for name in names], design)
        variance[:, own] = of_cell.variance
        dof = np.minimum(dof, of_cell.dof)
    return OverDocuments(variance, dof) if variance.any() else None


def ladder_half_widths(
    table: Array,
    design: Design,
    arms: Sequence[tuple[str, str, str]],
    level: float,
    documents: OverDocuments | None = None,
) -> Float[Array, "outcomes contrasts"]:
    """Half widths at a local level, nan for contrasts of too few runs.

    `table`: losses of all runs by outcome. `arms`: size, budget and arm of every arm of the design. All cells
    are judged on the same documents, so what `documents` adds is alike in them, and a level for independent
    errors is no smaller than need be.
    """
    fitted = fit(table, design)
    pooled = replace(fitted, spreads_differ=np.zeros_like(fitted.spreads_differ))
    cells = [(size, budget) for size, budget, _ in arms]
    groupings: list[Sequence[Hashable]] = [*zip(*arms, strict=True), cells]
    by_group = [group_half_widths(table, design, groups, level, documents) for groups in groupings]
    half = np.max([half_widths(pooled, level, documents), *by_group], axis=0)
    return np.where(enough_runs(design), half, np.nan)


def _observation(effect: Effect) -> Effect:
    """The effect without an interval."""
    return replace(effect, interval=None, outcome="observation")


def _decided(effect: Effect, half: float) -> Effect:
    """The effect with the half width of the fit over all cells; nan: it has no interval."""
    if not np.isfinite(half):
        return _observation(effect)
    interval = Interval(effect.estimate - half, effect.estimate + half)
    return replace(effect, interval=interval, outcome=outcome(interval.low, interval.high, effect.margin))


def ladder_detectable(plan: ComparisonPlan) -> dict[str, float] | None:
    """By modality of a known deviation, the smallest difference that a cell is likely to decide, in nats per
    token: that of the largest primary contrast. None if there will be too few seeds."""
    cells = plan.cells
    runs: list[Run] = [(run.cell, run.arm, run.seed) for run in plan.runs if run.cell is not None]
    rows: list[Row] = [(cell, name) for cell in cells for name in plan.config.verdicts]
    return detectable_in(ladder_design(cells, runs, rows), plan)
