"""Laws of loss over parameters and tokens, fitted to the arms of a ladder. This module imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.findings import Findings
from pretrain.comparison.isoflop import IsoFlopMinimum, isoflop_minimum
from pretrain.comparison.ladder_config import Cell, body_parameters
from pretrain.comparison.ladder_effects import LadderFit
from pretrain.comparison.scaling_fit import Law, Runs, ScalingFit, fit_law
from pretrain.comparison.statistics import Interval, interval_of_draws

DRAWS = 200


@dataclass(frozen=True)
class ArmLaw:
    """The law of one arm in one modality."""

    runs: Runs
    fit: ScalingFit
    largest_left_out: float
    """Mean log loss of the runs of the most tokens, less what the law of all other runs says; nan if too few
    are left."""


@dataclass(frozen=True)
class LawShare:
    """s at a cell by the laws of both arms, beside the one that is read between runs."""

    value: float
    """inf: by its law the arm never has the baseline's loss."""
    interval: Interval
    """Of draws of both laws; holds by itself."""
    extrapolated: bool
    """Whether these tokens lie outside the budgets that the arm was trained for at this size."""


Laws = Mapping[tuple[str, str], ArmLaw | str]
"""By (arm, modality), the law, or a sentence that says why there is none."""


def ladder_laws(
    cells: Mapping[Cell, Findings], arms: Sequence[str], modalities: Sequence[str]
) -> dict[tuple[str, str], ArmLaw | str]:
    """The laws of all arms. `cells`: those that are finished."""
    laws: dict[tuple[str, str], ArmLaw | str] = {}
    for arm in arms:
        for modality in modalities:
            runs = _runs(cells, arm, modality)
            try:
                fit = fit_law(runs, draws=DRAWS)
            except ValueError as error:
                laws[arm, modality] = f"{error}."
            else:
                laws[arm, modality] = ArmLaw(runs, fit, _largest_left_out(runs))
    return laws


def isoflop_minima(
    cells: Mapping[Cell, Findings],
    arms: Sequence[str],
    modalities: Sequence[str],
    fitted: LadderFit,
    confidence: float,
) -> dict[tuple[str, str, str], IsoFlopMinimum | str]:
    """By (arm, modality, budget), the size of least loss, or a sentence that says why it is not told.

    `cells`: those that are finished, of a ladder whose budgets are training FLOPs.
    """
    minima: dict[tuple[str, str, str], IsoFlopMinimum | str] = {}
    for arm in arms:
        for modality in modalities:
            for budget in dict.fromkeys(cell.budget for cell in cells):
                runs = _runs({c: f for c, f in cells.items() if c.budget == budget}, arm, modality)
                try:
                    found = isoflop_minimum(
                        runs.parameters,
                        runs.loss,
                        deviation=fitted.deviation.get(modality),
                        dof=fitted.dof,
                        confidence=confidence,
                    )
                except ValueError as error:
                    found = f"{error}"
                minima[arm, modality, budget] = found
    return minima


def _runs(cells: Mapping[Cell, Findings], arm: str, modality: str) -> Runs:
    """The runs of an arm that finished in these cells."""
    rows = [
        (body_parameters(run.config), run.config.total_tokens, loss)
        for findings in cells.values()
        if arm in findings.plan.arms and arm not in findings.scope.diverged
        for run, loss in zip(findings.runs(arm), findings.losses[arm, modality].per_seed, strict=True)
    ]
    parameters, tokens, losses = np.array(rows, float).reshape(-1, 3).T
    return Runs(parameters, tokens, losses)


def _largest_left_out(runs: Runs) -> float:
    """The error of the law of all other runs in the runs of the most tokens, in log loss; nan: too few."""
    largest = runs.tokens == runs.tokens.max()
    try:
        law = fit_law(runs.where(~largest), draws=0).law
    except ValueError:
        return math.nan
    left = runs.where(largest)
    return float(np.mean(np.log(left.loss) - np.log(law.loss(left.parameters, left.tokens))))


def law_share(base: ArmLaw, arm: ArmLaw, cell: Cell, confidence: float) -> LawShare:
    """s of an arm at a cell by the laws: its tokens to the loss that the baseline's law has there."""
    parameters, tokens = cell.parameters, cell.tokens

    def share(base_law: Law, arm_law: Law) -> float:
        level = base_law.loss(np.array([parameters]), np.array([tokens])).item()
        return arm_law.tokens_for(level, parameters) / tokens

    value = share(base.fit.law, arm.fit.law)
    drawn = [share(one, other) for one, other in zip(base.fit.draws, arm.fit.draws, strict=True)]
    own = arm.runs.tokens[np.isclose(arm.runs.parameters, parameters, rtol=0.05)]
    inside = len(own) > 0 and own.min() <= value * tokens <= own.max()
    return LawShare(value, interval_of_draws(drawn, confidence), not inside)
