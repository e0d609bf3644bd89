"""The keys of a comparison file: question, arms, and what is matched. This module imports no torch."""

import re
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from pretrain.comparison.contrasts import Difference, all_differences, check_contrasts, verdict_names
from pretrain.comparison.ladder_config import BudgetConfig, check_ladder
from pretrain.comparison.leaves import leaves
from pretrain.comparison.solved_size import SOLVED_KEYS, Solve
from pretrain.dotted_keys import covers

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
SET_BY_COMPARISON = ("name", "seed")
SET_BY_MATCH = (
    "total_tokens",
    "tokens_per_step",
    "model.context_tokens",
    "data.train",
    "data.heldout",
    "data.weights_of",
    "data.temperature",
    "runs_dir",
    "every_steps",
    "evaluate",
)
"""Keys that are equal in all arms, so that they see the same batches in the same order and the same
evaluation. Under match = "train_flops", total_tokens is set so that an arm spends the training FLOPs of the
baseline."""


RATE_KEY = "optimizer.learning_rate"
LEAST_ROUNDS = 5
"""Smallest number of timing rounds."""


class CompareConfig(BaseModel):
    """A comparison file: the question, what may differ, what is matched, and which metric decides."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    renamed: ClassVar[dict[str, str]] = {"jobs": "concurrent_runs"}

    name: str = Field(pattern=NAME_PATTERN)
    question: str = Field(min_length=1)
    base: str
    """The run file (TOML) that all arms start from, relative to the comparison file."""
    common: dict[str, Any] = {}
    """Values that every arm, the baseline included, sets over the base."""
    arms: dict[str, dict[str, Any]] = Field(min_length=2)
    """By arm, the values that it sets over the base, as nested tables or dotted keys, merged leaf by leaf."""
    baseline: str
    vary: tuple[str, ...] = Field(min_length=1)
    """Dotted keys in which arms may differ; the key of a table covers all keys below it."""
    seeds: tuple[NonNegativeInt, ...] = Field((1, 2, 3, 4, 5), min_length=1)
    """The seeds that every arm runs. A verdict needs three; one or two are an observation."""
    sizes: dict[str, dict[str, Any]] = {}
    """By size of a ladder, the values that it sets over the base in every arm. Arms and seeds are run at
    every size and every budget. A size may have `budgets` of its own, in the ladder's unit."""
    budgets: BudgetConfig | None = None
    """The lengths of a ladder's runs. They stretch the base run: warm-up and the intervals of every_steps
    keep their share of the steps."""
    extra_baseline_seeds: tuple[NonNegativeInt, ...] = ()
    """More seeds, which the baseline runs alone. Every contrast with the baseline gains by them."""
    match: Literal["tokens", "train_flops", "seconds"] = "tokens"
    """The budget that is equal in all arms. train_flops: an arm has as many steps as the baseline's training
    FLOPs allow, and its schedule is stretched over them (pretrain/comparison/matched_flops.py). seconds: the
    same with the seconds of timing rounds (pretrain/comparison/step_timing.py)."""
    timing_rounds: int | None = Field(None, ge=LEAST_ROUNDS)
    """Rounds in which every arm is timed, one after the other, before the runs begin. None: LEAST_ROUNDS with
    match = "seconds", else none, and the report then quotes no seconds."""
    solve: Solve | None = None
    """With match = "train_flops": the width or the depth of every arm but the baseline is solved, so that a
    step costs the baseline's FLOPs (pretrain/comparison/solved_size.py). All arms then have equal tokens too.
    None: sizes are those of the files, and the number of steps follows."""
    deciding_metric: Literal["eval/causal/loss", "eval/loss"] = "eval/causal/loss"
    """Held-out loss at the last step, per modality. eval/causal/loss: an arm that looks at later tokens to
    choose which tokens run is judged by the loss of its causal form, any other arm by its eval/loss.
    eval/loss: an arm is judged under its own rule, which flatters one that looks ahead."""
    confidence: float = Field(0.95, gt=0.5, lt=1)
    """Chance that the intervals of all primary contrasts in all modalities hold together."""
    margin: float = Field(0.005, gt=0, lt=1)
    """Share of the baseline's loss below which a difference does not matter. Arms whose interval lies within
    it are equivalent."""
    contrasts: dict[str, Difference] = {}
    """Further contrasts by name: [a, b] is arm a minus arm b, [[a, b], [c, d]] is an interaction, (a minus b)
    minus (c minus d). The contrast of an arm with the baseline is there anyway, under the arm's name."""
    primary: tuple[str, ...] | None = Field(None, min_length=1)
    """Names of the contrasts that are verdicts. Their intervals hold together; other contrasts are
    exploratory, and their intervals hold one by one. None: every arm with the baseline."""
    pilot_deviation: dict[str, PositiveFloat] = {}
    """By modality, the expected standard deviation over seeds of the final loss, in nats per token. From it
    follows the smallest difference that the comparison is likely to see, which is printed before it runs."""
    concurrent_runs: PositiveInt = 1
    """Number of runs at a time, on this machine or in an array of Slurm jobs."""
    threads_per_run: PositiveInt | None = None
    """Threads of a process. None: CPU cores / (concurrent_runs x processes_per_run)."""
    processes_per_run: PositiveInt = 1
    """Ranks of a run of `motley compare`, on this machine. `motley submit` takes them from the profile."""
    rates: tuple[PositiveFloat, ...] = ()
    """Learning rates that are tried in every arm, in a ladder in every cell, by runs of the same length. The
    arm's runs have the one of least held-out loss (pretrain/comparison/rate_grid.py). (): the files' rate."""
    tuning_seeds: tuple[NonNegativeInt, ...] = Field((101, 102, 103), min_length=1)
    """The seeds of the runs that try `rates`, apart from those that are compared. With three, what the choice
    leaves to chance hardly counts (docs/results/error_rates.md)."""
    tuning: str | None = None
    """How learning rate and the like were chosen, and with which budget per arm. The report prints it."""

    @model_validator(mode="after")
    def _check(self) -> "CompareConfig":
        if self.baseline not in self.arms:
            raise ValueError(f'baseline = "{self.baseline}" is no arm; arms: {", ".join(self.arms)}')
        seeds = [*self.seeds, *self.extra_baseline_seeds]
        if len(set(seeds)) != len(seeds):
            raise ValueError(
                f"seeds = {list(self.seeds)}, extra_baseline_seeds = {list(self.extra_baseline_seeds)}: "
                "a seed is named twice; equal seeds give equal runs"
            )
        for arm in self.arms:
            if not re.fullmatch(NAME_PATTERN, arm):
                raise ValueError(f'arms."{arm}": it names folders; use letters, digits, "_", "-" and "."')
        check_ladder(self.sizes, self.budgets, self.arms, NAME_PATTERN)
        check_contrasts(tuple(self.arms), self.baseline, self.contrasts, self.primary, NAME_PATTERN)
        self._check_solve()
        self._check_rates()
        for key in self.vary:
            for fixed in (*SET_BY_COMPARISON, *SET_BY_MATCH):
                if covers(key, fixed) or covers(fixed, key):
                    why = (
                        "the comparison sets it"
                        if fixed in SET_BY_COMPARISON
                        else f'match = "{self.match}" holds it equal in all arms'
                    )
                    raise ValueError(f'vary names "{key}", but {why}; take it out of `vary`')
        return self

    @property
    def rounds(self) -> int:
        """The number of timing rounds; 0: there are none."""
        return self.timing_rounds or (LEAST_ROUNDS if self.match == "seconds" else 0)

    def _check_solve(self) -> None:
        """Refuse what contradicts `solve`."""
        if self.solve is None:
            return
        if self.match != "train_flops":
            raise ValueError(
                f'solve = "{self.solve}" makes training FLOPs equal, but match = "{self.match}"; set match = '
                '"train_flops", or take solve out'
            )
        solved = SOLVED_KEYS[self.solve]
        named = [("vary", key) for key in self.vary]
        named += [(f'arms."{arm}"', key) for arm, table in self.arms.items() for key, _ in leaves(table)]
        for where, key in named:
            if covers(key, solved) or covers(solved, key):
                raise ValueError(f'{where} names "{key}", but solve = "{self.solve}" decides it; take it out')

    def _check_rates(self) -> None:
        """Refuse a grid in which no rate has one on both sides, and what contradicts a grid."""
        if not self.rates:
            return
        if len(self.rates) < 3 or len({f"{rate:g}" for rate in self.rates}) != len(self.rates):
            raise ValueError(
                f"rates = {list(self.rates)}: name three or more that differ in their first six digits, "
                "because the best one needs one on both sides"
            )
        seeds = [*self.seeds, *self.extra_baseline_seeds, *self.tuning_seeds]
        if len(set(seeds)) != len(seeds):
            raise ValueError(
                f"tuning_seeds = {list(self.tuning_seeds)} names a seed twice, or one of the seeds that are "
                "compared, whose losses would then be those of a lucky choice; take others"
            )
        tables = [(f'arms."{arm}"', table) for arm, table in self.arms.items()]
        tables += [(f'sizes."{size}"', table) for size, table in self.sizes.items()]
        named = [("vary", key) for key in self.vary]
        named += [(where, key) for where, table in tables for key, _ in leaves(table)]
        for where, key in named:
            if covers(key, RATE_KEY):
                raise ValueError(f'{where} names "{key}", but `rates` decides {RATE_KEY}; take it out')

    @property
    def differences(self) -> dict[str, Difference]:
        """All contrasts by name: every arm with the baseline, then those that the file names."""
        return all_differences(tuple(self.arms), self.baseline, self.contrasts)

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Names of the primary contrasts."""
        return verdict_names(tuple(self.arms), self.baseline, self.primary)
