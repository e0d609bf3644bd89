"""The findings of a ladder: every cell as a comparison, decided together, and what follows along budgets.

This module imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.findings import Contrast, Findings, find
from pretrain.comparison.isoflop import IsoFlopMinimum
from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.ladder_effects import LadderFit, ladder_effects
from pretrain.comparison.ladder_laws import Laws, isoflop_minima, ladder_laws
from pretrain.comparison.ladder_shares import Curve, EqualLossShare, Turn, equal_loss_share, turn
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.plan_file import Addition
from pretrain.comparison.results import RunResult
from pretrain.comparison.scope import RunEnd, run_ends


@dataclass(frozen=True)
class LadderFindings:
    """Everything that the report of a ladder states."""

    plan: ComparisonPlan
    cells: dict[Cell, Findings]
    """By cell, in order, its findings, with the intervals of the fit over all cells."""
    missing: dict[Cell, str]
    """Cells on which nothing can be said yet, and why."""
    fit: LadderFit
    modalities: tuple[str, ...]
    """The modalities that all cells have evaluated."""
    ends: dict[str, RunEnd]
    """By name, how every planned run ended."""
    shares: dict[tuple[str, str, str], dict[Cell, EqualLossShare]]
    """By (size, arm, modality), the share at every budget from the second on."""
    turns: dict[tuple[str, str, str], Turn]
    """By (size, arm, modality), where the sign of arm minus baseline turns."""
    laws: Laws
    """By (arm, modality), the baseline included, the law over parameters and tokens."""
    minima: dict[tuple[str, str, str], IsoFlopMinimum | str]
    """By (arm, modality, budget), the size of least loss where budgets are training FLOPs; else empty."""
    added: tuple[Addition, ...]

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms but the baseline."""
        return self.plan.others

    @property
    def sizes(self) -> dict[str, dict[Cell, Findings]]:
        """By size, its cells, in rising order of budgets."""
        sizes: dict[str, dict[Cell, Findings]] = {}
        for cell, findings in self.cells.items():
            sizes.setdefault(cell.size, {})[cell] = findings
        return sizes

    def contrast(self, cell: Cell, arm: str, modality: str) -> Contrast | None:
        """The contrast of an arm with the baseline in a cell; None if every run of the arm failed there."""
        return _contrast(self.cells[cell], arm, modality)


def find_ladder(
    plan: ComparisonPlan, results: Sequence[RunResult], added: Sequence[Addition] = ()
) -> LadderFindings:
    """The findings of a ladder. Raises ConfigError while no cell can be reported on."""
    cells, missing, ends = {}, {}, {}
    for cell, of_cell in plan.cells.items():
        names = {run.name for run in of_cell.runs}
        in_cell = [run for run in results if run.planned.name in names]
        ends |= run_ends(in_cell)
        try:
            cells[cell] = find(of_cell, in_cell)
        except ConfigError as error:
            missing[cell] = str(error)
    if not cells:
        cell, why = next(iter(missing.items()))
        raise ConfigError(f"no cell can be reported on; {cell.name}, the first: {why}")
    first = next(iter(cells.values()))
    modalities = tuple(m for m in first.modalities if all(m in f.modalities for f in cells.values()))
    fitted = ladder_effects(cells, modalities)
    cells = {cell: _with_effects(findings, fitted, cell) for cell, findings in cells.items()}
    shares: dict[tuple[str, str, str], dict[Cell, EqualLossShare]] = {}
    turns: dict[tuple[str, str, str], Turn] = {}
    for size in dict.fromkeys(cell.size for cell in cells):
        for arm in plan.others:
            of_size = {c: f for c, f in cells.items() if c.size == size and _is_finished(f, arm)}
            for modality in modalities if of_size else ():
                shares[size, arm, modality] = _shares(of_size, fitted, arm, modality)
                turns[size, arm, modality] = _turn(of_size, arm, modality)
    finished = {c: f for c, f in cells.items() if not f.scope.interim and f.fingerprints.proven}
    laws = ladder_laws(finished, plan.arms, modalities)
    config, minima = plan.config, {}
    if config.budgets is not None and config.budgets.unit == "train_flops":
        minima = isoflop_minima(finished, plan.arms, modalities, fitted, config.confidence)
    return LadderFindings(
        plan, cells, missing, fitted, modalities, ends, shares, turns, laws, minima, tuple(added)
    )


def _with_effects(findings: Findings, fitted: LadderFit, cell: Cell) -> Findings:
    """The findings of a cell with the effects of the fit over all cells."""
    effects = findings.effects | dict(fitted.effects[cell])
    contrasts = tuple(replace(c, final=effects[c.arm, c.modality]) for c in findings.contrasts)
    return replace(findings, effects=effects, contrasts=contrasts)


def _contrast(findings: Findings, arm: str, modality: str) -> Contrast | None:
    return next((c for c in findings.contrasts if (c.arm, c.modality) == (arm, modality)), None)


def _is_finished(findings: Findings, arm: str) -> bool:
    """Whether a cell tells final losses of an arm and the baseline, on the same data."""
    scope, baseline = findings.scope, findings.plan.config.baseline
    sound = arm in findings.plan.arms and not {arm, baseline} & set(scope.diverged)
    return sound and not scope.interim and findings.fingerprints.proven


def _curve(cells: dict[Cell, Findings], arm: str, modality: str) -> Curve:
    """The final losses of an arm over the budgets of one size, along what the comparison matches."""

    def budget(findings: Findings) -> float:
        runs = findings.runs(arm)
        match = findings.plan.config.match
        if match == "tokens":
            return runs[0].config.total_tokens
        if match == "seconds":
            return float(runs[0].curve("compute/train_flops").seconds[-1])
        return float(np.mean([run.curve("compute/train_flops").values[-1] for run in runs]))

    return Curve(
        np.array([budget(f) for f in cells.values()], float),
        np.array([f.losses[arm, modality].mean for f in cells.values()]),
        np.array([len(f.runs(arm)) for f in cells.values()], float),
    )


def _shares(
    cells: dict[Cell, Findings], fitted: LadderFit, arm: str, modality: str
) -> dict[Cell, EqualLossShare]:
    """By cell from the second on, the share at its budget."""
    config = next(iter(cells.values())).plan.config
    base, other = (_curve(cells, name, modality) for name in (config.baseline, arm))
    return {
        cell: equal_loss_share(
            base.until(last),
            other.until(last),
            deviation=fitted.deviation.get(modality),
            dof=fitted.dof,
            confidence=config.confidence,
        )
        for last, cell in enumerate(cells)
        if last
    }


def _turn(cells: dict[Cell, Findings], arm: str, modality: str) -> Turn:
    contrasts = [f.contrast(arm, modality) for f in cells.values()]
    winners = [0 if c.winner is None else -1 if c.winner == arm else 1 for c in contrasts]
    x = [cell.tokens_per_parameter for cell in cells]
    return turn(x, [c.final.estimate for c in contrasts], winners)
