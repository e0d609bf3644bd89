"""The plan of a comparison: all its runs, as they follow from its file. This module imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.comparison.compare_config import CompareConfig
from pretrain.comparison.contrasts import without_arms
from pretrain.comparison.ladder_config import Cell
from pretrain.comparison.solved_size import SolvedSize
from pretrain.config import RunConfig

if TYPE_CHECKING:  # it reads results, which know plans
    from pretrain.comparison.rate_grid import RateChoice
    from pretrain.comparison.step_timing import StepTiming


CellArm = tuple[str, str]
"""The name of a cell, "" in a comparison of one, and an arm."""
SizeArm = tuple[str, str]
"""The name of a size, "" in a comparison of one, and an arm."""


@dataclass(frozen=True)
class PlannedRun:
    """One run of a comparison."""

    arm: str
    seed: int
    config: RunConfig
    cell: Cell | None = None
    """The size and budget of a run of a ladder; None in a comparison of one."""
    solved: SolvedSize | None = None
    """What was solved for its arm; None for the baseline, and where nothing is solved."""
    rate: float | None = None
    """The learning rate that a run of the grid tries; None in a run that a report uses."""
    round: int | None = None
    """The timing round that it is of; None in a run that learns."""
    step_s: float | None = None
    """Seconds of a step by timing rounds; None without them."""

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def num_steps(self) -> int:
        return self.config.num_steps

    @property
    def cell_arm(self) -> CellArm:
        """The name of its cell, "" in a comparison of one, and its arm."""
        return (self.cell.name if self.cell else "", self.arm)

    @property
    def size_arm(self) -> SizeArm:
        """The name of its size, "" in a comparison of one, and its arm."""
        return (self.cell.size if self.cell else "", self.arm)


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison and all its runs, ordered by seed, cell of a ladder, and arm; extra seeds come last."""

    path: Path
    """The comparison file."""
    overrides: tuple[str, ...]
    config: CompareConfig
    runs: tuple[PlannedRun, ...]
    """While `first` is not empty, their learning rates or, at equal seconds, their lengths are not known."""
    first: tuple[PlannedRun, ...] = ()
    """Runs that must end before `runs` can begin: timing rounds or a grid of rates; empty once they have."""
    rates: "Mapping[CellArm, RateChoice]" = field(default_factory=dict)
    """The rates that a grid has chosen; empty without one, and until it has ended."""
    timing: "Mapping[SizeArm, StepTiming]" = field(default_factory=dict)
    """What timing rounds found; empty without them, and until they have ended."""

    @property
    def next_runs(self) -> tuple[PlannedRun, ...]:
        """The runs that are made next, some of which may have ended."""
        return self.first or self.runs

    @property
    def directory(self) -> Path:
        """The directory of the comparison, with a folder per run."""
        return Path(self.runs[0].config.runs_dir)

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of all arms: the baseline, then the others in the order of the file."""
        return (self.config.baseline, *self.others)

    @property
    def others(self) -> tuple[str, ...]:
        """The names of all arms but the baseline."""
        return tuple(arm for arm in self.config.arms if arm != self.config.baseline)

    @property
    def cells(self) -> dict[Cell, "ComparisonPlan"]:
        """By cell of a ladder, the plan of its runs, by size in the order of the file, then by budget."""
        cells = dict.fromkeys(run.cell for run in self.runs if run.cell is not None)
        return {
            cell: replace(
                self,
                runs=tuple(run for run in self.runs if run.cell == cell),
                rates={at: choice for at, choice in self.rates.items() if at[0] == cell.name},
            )
            for cell in cells
        }

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that every arm runs."""
        return self.config.seeds

    @property
    def modalities(self) -> tuple[str, ...]:
        """The modalities of the vocabulary, in its order."""
        return tuple(self.runs[0].config.model.modalities)

    @property
    def vector_modalities(self) -> tuple[str, ...]:
        """The modalities whose losses are squared errors of vectors."""
        return self.runs[0].config.model.learned_vectors

    @property
    def tokens_per_step(self) -> float:
        return self.runs[0].config.tokens_per_step

    @property
    def run_configs(self) -> dict[str, RunConfig]:
        """By arm, the baseline first, the config of one of its runs, which differ in the seed alone."""
        return {arm: next(run.config for run in self.runs if run.arm == arm) for arm in self.arms}

    @property
    def solved(self) -> dict[str, SolvedSize]:
        """By "arm", or "size, arm" in a ladder, what was solved for it; empty where nothing is."""
        return {
            f"{run.cell.size}, {run.arm}" if run.cell else run.arm: run.solved
            for run in self.runs
            if run.solved is not None
        }

    def run(self, arm: str, seed: int) -> PlannedRun:
        return next(run for run in self.runs if (run.arm, run.seed) == (arm, seed))

    def without(self, arms: Sequence[str]) -> "ComparisonPlan":
        """The plan without some arms, which are not the baseline, and without their contrasts."""
        if not arms:
            return self
        gone, primary = without_arms(self.config.differences, self.config.verdicts, arms)
        left = {arm: table for arm, table in self.config.arms.items() if arm not in arms}
        contrasts = {name: d for name, d in self.config.contrasts.items() if name not in gone}
        config = self.config.model_copy(update={"arms": left, "contrasts": contrasts, "primary": primary})
        return replace(self, config=config, runs=tuple(run for run in self.runs if run.arm not in arms))
