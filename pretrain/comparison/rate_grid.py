"""Learning rates by a grid of equal budget: every arm is trained at every rate, on seeds kept for that.

The runs of the grid come first, in the folder `tuning` of the comparison, and are as long as the arm's own.
An arm's rate is the one of least mean held-out loss over the tuning seeds. The arm's runs, on other seeds,
are then made at that rate, so that luck in the choice is in no loss that decides. This module imports no
torch.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.plan import CellArm, ComparisonPlan, PlannedRun
from pretrain.comparison.results import HELD_OUT, load_run
from pretrain.config import RunConfig
from pretrain.quantities import flops, join
from pretrain.run_dir import check_config, finished_step, read_record

TUNING = "tuning"
"""Folder of the grid's runs in the directory of a comparison."""
DIVERGED = ("is not finite", " is a spike: ", " is spike number ")
"""Words of the errors that end a run whose loss or gradient is no number (pretrain/train/finite.py), or leaps
as often as no more is allowed (pretrain/train/spikes.py). Another attempt would meet the same."""


@dataclass(frozen=True)
class RateChoice:
    """The grid of one arm, in one cell of a ladder, after all its runs."""

    losses: Mapping[float, tuple[float, ...]]
    """By rate, in rising order, the final held-out losses of the tuning seeds; nan: the run diverged."""
    train_flops: float
    """Training FLOPs of all runs of the grid of the arm."""

    @property
    def means(self) -> dict[float, float]:
        """By rate, the mean loss over the tuning seeds; inf where a run diverged."""
        means = {rate: float(np.mean(losses)) for rate, losses in self.losses.items()}
        return {rate: mean if math.isfinite(mean) else math.inf for rate, mean in means.items()}

    @property
    def rate(self) -> float:
        """The rate of least mean loss."""
        means = self.means
        return min(means, key=lambda rate: means[rate])

    @property
    def at_edge(self) -> bool:
        """Whether the rate is the lowest or the highest of the grid, so that a better one may lie beyond."""
        rates = list(self.losses)
        return self.rate in (rates[0], rates[-1])


def tuning_runs(plan: ComparisonPlan) -> tuple[PlannedRun, ...]:
    """The runs of the grid: every arm (of every cell) at every rate, on every tuning seed."""
    first: dict[CellArm, PlannedRun] = {}
    for run in plan.runs:
        first.setdefault(run.cell_arm, run)
    return tuple(
        replace(run, seed=seed, rate=rate, config=_at_rate(run, rate, seed))
        for seed in plan.config.tuning_seeds
        for run in first.values()
        for rate in sorted(plan.config.rates)
    )


def _at_rate(run: PlannedRun, rate: float, seed: int) -> RunConfig:
    """The config of a run of the grid, which evaluates the held-out loss alone."""
    config = with_rate(run.config, rate)
    name = f"{run.name.removesuffix(f'_seed{run.seed}')}_rate{rate:g}_seed{seed}".replace("+", "")
    alone = {"generate": 0, "last_documents": None, "conditional_documents": 0}
    changes: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "runs_dir": str(Path(config.runs_dir) / TUNING),
        "evaluate": config.evaluate.model_copy(update=alone),
        "every_steps": config.every_steps.model_copy(update={"samples": None}),
    }
    return config.model_copy(update=changes)


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    """The config with another learning rate."""
    return config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"learning_rate": rate})}
    )


def has_diverged(config: RunConfig) -> bool:
    """Whether a run ended because its loss or gradient was no number, or a spike."""
    record = read_record(config.run_dir)
    if record.get("status") != "failed":
        return False
    reason = str(record["attempts"][-1].get("reason"))
    return any(words in reason for words in DIVERGED)


def has_ended(run: PlannedRun) -> bool:
    """Whether a run of the grid needs no further attempt: it is done, or its rate made it diverge."""
    return finished_step(run.config) == run.num_steps or has_diverged(run.config)


def rate_choices(plan: ComparisonPlan, tuning: Sequence[PlannedRun]) -> dict[CellArm, RateChoice]:
    """By (cell, arm), the grid after all runs `tuning`, which have ended.

    Raises ConfigError for files that a run cannot have written, and for an arm that diverged at every rate.
    """
    causally = plan.config.deciding_metric == "eval/causal/loss"
    losses: dict[CellArm, dict[float, list[float]]] = {}
    spent: dict[CellArm, float] = {}
    for run in tuning:
        result = load_run(run, causally)
        curve, cost = result.curve(f"{HELD_OUT}loss").values, result.curve("compute/train_flops").values
        assert run.rate is not None
        loss = float(curve[-1]) if result.finished and len(curve) else math.nan
        losses.setdefault(run.cell_arm, {}).setdefault(run.rate, []).append(loss)
        spent[run.cell_arm] = spent.get(run.cell_arm, 0.0) + (float(cost[-1]) if len(cost) else 0.0)
    found = {
        at: RateChoice({rate: tuple(own) for rate, own in by_rate.items()}, spent[at])
        for at, by_rate in losses.items()
    }
    for (cell, arm), choice in found.items():
        if not math.isfinite(min(choice.means.values())):
            raise ConfigError(
                f'{plan.path}: arms."{arm}"{f" in {cell}" if cell else ""} diverged on a tuning seed at '
                f"every one of rates = {sorted(plan.config.rates)}; add lower rates"
            )
    return found


def with_rates(plan: ComparisonPlan) -> ComparisonPlan:
    """The plan with the rates that its grid has chosen, or with the grid's runs as those that come first.

    Raises ConfigError for a grid of runs that another config made.
    """
    tuning = tuning_runs(plan)
    if not all(map(has_ended, tuning)):
        return replace(plan, first=tuning)
    for run in tuning:  # of an earlier base run they would choose rates for another model
        check_config(run.config)
    choices = rate_choices(plan, tuning)
    runs = (replace(run, config=with_rate(run.config, choices[run.cell_arm].rate)) for run in plan.runs)
    return replace(plan, runs=tuple(runs), rates=choices)


def rate_lines(plan: ComparisonPlan) -> list[str]:
    """A line for every grid, such as "Learning rate of mot: 0.002 of 3 rates, 2 tuning seeds, 1.2 PFLOPs"."""
    seeds = len(plan.config.tuning_seeds)
    return [
        f"Learning rate of {f'{cell}, ' if cell else ''}{arm}: {choice.rate:g}"
        f"{', THE EDGE OF THE GRID' * choice.at_edge}, of {len(choice.losses)} rates x {seeds} tuning "
        f"seed(s), {flops(choice.train_flops)}"
        for (cell, arm), choice in plan.rates.items()
    ]


def rates_sentence(plan: ComparisonPlan, arms: Sequence[str]) -> str:
    """Say whether arms were judged at their best rates; "" where rates were not chosen by a grid."""
    own = {at: choice for at, choice in plan.rates.items() if at[1] in arms}
    if not own:
        return ""
    edges = [at for at, choice in own.items() if choice.at_edge]
    if not edges:
        return "Each arm has the best rate of an equal grid, with a worse one on both sides."
    named = join(list(dict.fromkeys(f"{arm} ({own[cell, arm].rate:g})" for cell, arm in edges)))
    where = f" in {len({cell for cell, _ in edges})} cells" if edges[0][0] else ""
    return (
        f"The rate of {named} is the edge of the grid{where}: a better one may lie beyond, and nothing is "
        "claimed at its best rate."
    )
