"""The question that is put to logs made elsewhere, and the plan that the analysis sees.

A comparison that Motley runs is a ComparisonPlan, made before its runs (pretrain/comparison/config.py). Of
foreign runs only logs exist, so their plan is made from these. The statistics and the report take either.
This module imports no torch.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pretrain.comparison.compare_config import NAME_PATTERN, CompareConfig
from pretrain.comparison.contrasts import (
    Difference,
    all_differences,
    check_contrasts,
    verdict_names,
    without_arms,
)
from pretrain.comparison.plan import ComparisonPlan
from pretrain.config import RunConfig


class ForeignConfig(BaseModel):
    """A question file: what is asked of foreign runs. A key means what it means in a comparison file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=NAME_PATTERN)
    """The report is written into runs_dir/name/report. The first log's name is the default."""
    question: str = Field("Which arm has the lower held-out loss?", min_length=1)
    arms: tuple[str, ...] = Field(min_length=2)
    """The arms that are compared, in this order. All arms of the logs are the default."""
    baseline: str
    size: float | None = Field(None, gt=0)
    """The size to compare, where the logs of an arm hold several."""
    match: Literal["tokens", "train_flops"] = "tokens"
    """What is equal in all arms. The report says where the logs show that it is not."""
    same_data: bool = False
    """Whether all arms of a seed are known to have read the same data in the same order, and all runs to have
    been judged on the same held-out data. Logs made elsewhere cannot prove it. False: nothing is decided."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    margin: float = Field(0.005, gt=0, lt=1)
    contrasts: dict[str, Difference] = {}
    primary: tuple[str, ...] | None = Field(None, min_length=1)
    tuning: str | None = None
    runs_dir: str = "runs"

    @model_validator(mode="after")
    def _check(self) -> "ForeignConfig":
        if self.baseline not in self.arms:
            raise ValueError(f'baseline = "{self.baseline}" is no arm; arms: {", ".join(self.arms)}')
        if len(set(self.arms)) != len(self.arms):
            raise ValueError(f"arms = {list(self.arms)} names an arm twice")
        for arm in self.arms:
            if not re.fullmatch(NAME_PATTERN, arm):
                raise ValueError(f'arm "{arm}": it names folders; use letters, digits, "_", "-" and "."')
        check_contrasts(self.arms, self.baseline, self.contrasts, self.primary, NAME_PATTERN)
        return self

    @property
    def differences(self) -> dict[str, Difference]:
        """All contrasts by name: every arm with the baseline, then those that the file names."""
        return all_differences(self.arms, self.baseline, self.contrasts)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Names of the primary contrasts."""
        return verdict_names(self.arms, self.baseline, self.primary)


@dataclass(frozen=True)
class ForeignRun:
    """One run of which only a log is known."""

    arm: str
    seed: int
    num_steps: int
    """The last step of the longest run of the arm. A run that ends before it has not finished."""

    @property
    def name(self) -> str:
        return f"{self.arm}_seed{self.seed}"


@dataclass(frozen=True)
class ForeignPlan:
    """The arms and runs of foreign logs, with the interface of ComparisonPlan."""

    path: Path
    """The question file, or the first log."""
    sources: tuple[Path, ...]
    """The logs: CSV files and run directories."""
    overrides: tuple[str, ...]
    config: ForeignConfig
    runs: tuple[ForeignRun, ...]
    modalities: tuple[str, ...]
    tokens_per_step: float
    """Tokens of a run of the baseline over its steps."""
    sizes: Mapping[str, float]
    """By arm, the size that its log states; arms without one are left out."""
    notes: tuple[str, ...]
    """Sentences on what the logs lack, which become caveats."""

    @property
    def vector_modalities(self) -> tuple[str, ...]:
        """No modality: logs do not tell units, and losses are taken to be in nats."""
        return ()

    @property
    def directory(self) -> Path:
        """The directory of the comparison, which holds its report."""
        return Path(self.config.runs_dir) / self.config.name

    @property
    def arms(self) -> tuple[str, ...]:
        """The names of all arms: the baseline, then the others."""
        return (self.config.baseline, *self.others)

    @property
    def others(self) -> tuple[str, ...]:
        """The names of all arms but the baseline."""
        return tuple(arm for arm in self.config.arms if arm != self.config.baseline)

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all runs."""
        return tuple(sorted({run.seed for run in self.runs}))

    @property
    def run_configs(self) -> dict[str, RunConfig]:
        """Empty, since the configs of foreign runs are not known."""
        return {}

    def without(self, arms: Sequence[str]) -> "ForeignPlan":
        """The plan without some arms, which are not the baseline, and without their contrasts."""
        if not arms:
            return self
        gone, primary = without_arms(self.config.differences, self.config.verdicts, arms)
        left = tuple(arm for arm in self.config.arms if arm not in arms)
        contrasts = {name: d for name, d in self.config.contrasts.items() if name not in gone}
        config = self.config.model_copy(update={"arms": left, "contrasts": contrasts, "primary": primary})
        return replace(self, config=config, runs=tuple(run for run in self.runs if run.arm not in arms))


Plan = ComparisonPlan | ForeignPlan
Question = CompareConfig | ForeignConfig
