"""The cells of a ladder: the sizes and budgets of a comparison file, and the base run of every cell.

A ladder asks the question of a comparison in cells, one for each size and budget. This module imports no
torch.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from pretrain.comparison.leaves import leaves
from pretrain.config import RunConfig
from pretrain.dotted_keys import covers
from pretrain.models.accounting import active_body_parameters

OWN_BUDGETS = "budgets"
"""Key of a size's table that is no key of a run: the size's budgets, in place of those of the ladder."""
OF_ALL_SIZES = {
    "name": "the comparison names its runs",
    "seed": "`seeds` of the comparison does",
    "total_tokens": "`budgets` does",
    "runs_dir": "the runs of a ladder stand in one folder",
    "data": "all sizes read the same data",
    "evaluate": "all sizes are evaluated alike",
}
"""Keys of a run that no size may set, and why."""


BudgetUnit = Literal["total_tokens", "tokens_per_parameter", "train_flops"]
_NAME_ENDS = {"total_tokens": "tok", "tokens_per_parameter": "tpp", "train_flops": "flop"}
"""Unit -> end of a budget's name."""


class BudgetConfig(BaseModel):
    """The lengths of a ladder's runs, in one of three units, for sizes that have no budgets of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    total_tokens: tuple[PositiveInt, ...] | None = Field(None, min_length=1)
    """Training tokens of a run."""
    tokens_per_parameter: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """Training tokens of a run over the parameters of the baseline that a token meets, embedding and head
    left out (mean over the modalities)."""
    train_flops: tuple[PositiveFloat, ...] | None = Field(None, min_length=1)
    """Training FLOPs of a run of the baseline, as match = "train_flops" counts them. At one such budget the
    size of least loss is looked for (pretrain/comparison/isoflop.py)."""

    @model_validator(mode="after")
    def _check(self) -> "BudgetConfig":
        if sum(getattr(self, unit) is not None for unit in _NAME_ENDS) != 1:
            raise ValueError(f"give one of {', '.join(_NAME_ENDS)}, a list")
        self.names(self.values)
        return self

    @property
    def unit(self) -> BudgetUnit:
        """The unit of all budgets of the ladder."""
        units: tuple[BudgetUnit, ...] = get_args(BudgetUnit)
        return next(unit for unit in units if getattr(self, unit) is not None)

    @property
    def values(self) -> tuple[float, ...]:
        """The budgets of a size that has none of its own."""
        return getattr(self, self.unit)

    def names(self, values: Sequence[float]) -> dict[float, str]:
        """The names of budgets, in rising order, such as "20tpp". Raises ValueError for one that is twice
        there."""
        style = ".0f" if self.unit == "total_tokens" else "g"
        end = _NAME_ENDS[self.unit]
        names = {value: f"{value:{style}}".replace("+", "") + end for value in sorted(values)}
        if len(set(names.values())) != len(values):
            raise ValueError(f"{list(values)} names a budget twice; equal budgets give equal runs")
        return names


@dataclass(frozen=True)
class Cell:
    """A size and a budget: the runs of a cell differ in arm and seed alone."""

    size: str
    budget: str
    """The budget's name, which begins with its number: "20tpp", "4000000tok" or "1e12flop"."""
    parameters: float
    """Parameters of the baseline that a token meets, embedding and head left out: mean over modalities."""
    tokens: int
    """Training tokens of a run of the baseline: whole steps."""

    @property
    def name(self) -> str:
        """A name that begins the names of the cell's runs."""
        return f"{self.size}_{self.budget}"

    @property
    def tokens_per_parameter(self) -> float:
        """Training tokens per active parameter of the baseline, of the whole steps that are run."""
        return self.tokens / self.parameters


def check_ladder(
    sizes: Mapping[str, Mapping[str, Any]],
    budgets: BudgetConfig | None,
    arms: Mapping[str, Mapping[str, Any]],
    pattern: str,
) -> None:
    """Raise ValueError unless sizes and budgets are both there or both left out, and sizes have legal names
    and set legal keys."""
    if bool(sizes) != (budgets is not None):
        here, missing = ("sizes", "budgets") if sizes else ("budgets", "sizes")
        raise ValueError(
            f"{here} makes this a ladder, which needs {missing} too: a table [sizes.NAME] of keys for every "
            f"size, and [budgets] with one of {', '.join(_NAME_ENDS)}"
        )
    of_arms = [(arm, key) for arm, table in arms.items() for key, _ in leaves(table)]
    for size, table in sizes.items():
        if not re.fullmatch(pattern, size):
            raise ValueError(f'sizes."{size}": it names folders; use letters, digits, "_", "-" and "."')
        if budgets is not None:
            _own_budgets(size, table, budgets)
        for key, _ in leaves(run_keys(table)):
            if fixed := next((fixed for fixed in OF_ALL_SIZES if covers(fixed, key)), None):
                raise ValueError(f'sizes."{size}" sets "{key}", but {OF_ALL_SIZES[fixed]}; take it out')
            if arm := next((a for a, other in of_arms if covers(key, other) or covers(other, key)), None):
                raise ValueError(f'sizes."{size}" sets "{key}", and arms."{arm}" does too; take out one')


def run_keys(table: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a run in the table of a size, which may also hold budgets of its own."""
    return {key: value for key, value in table.items() if key != OWN_BUDGETS}


def _own_budgets(size: str, table: Mapping[str, Any], budgets: BudgetConfig) -> Sequence[float]:
    """The budgets of a size. Raises ValueError for illegal ones."""
    if OWN_BUDGETS not in table:
        return budgets.values
    own, kind = table[OWN_BUDGETS], int if budgets.unit == "total_tokens" else (int, float)
    legal = isinstance(own, list | tuple) and own
    numbers = legal and all(isinstance(n, kind) and not isinstance(n, bool) for n in own)
    if not numbers or not all(0 < n < math.inf for n in own):
        raise ValueError(
            f'sizes."{size}".{OWN_BUDGETS} = {own!r}: expected a list of {budgets.unit}, numbers above 0'
        )
    try:
        budgets.names(own)
    except ValueError as error:
        raise ValueError(f'sizes."{size}".{OWN_BUDGETS}: {error}') from None
    return own


def body_parameters(config: RunConfig) -> float:
    """Parameters that a token meets, embedding and head left out: mean over the modalities."""
    model = config.model
    return sum(active_body_parameters(model, m) for m in model.modalities) / len(model.modalities)


def cells_of(
    size: str,
    table: Mapping[str, Any],
    baseline: RunConfig,
    budgets: BudgetConfig,
    step_flops: Callable[[RunConfig], Fraction],
) -> tuple[Cell, ...]:
    """The cells of a size, in rising order of budgets.

    `table`: the size's in the file. `baseline`: the baseline's run of the size. `step_flops`: training FLOPs
    of a step of a run. A budget is rounded to whole steps, one at least.
    """
    parameters, step = body_parameters(baseline), baseline.tokens_per_step
    of_step = {"total_tokens": lambda: step, "tokens_per_parameter": lambda: step / parameters}
    of_step["train_flops"] = lambda: float(step_flops(baseline))
    unit = of_step[budgets.unit]()
    return tuple(
        Cell(size, name, parameters, max(1, round(value / unit)) * step)
        for value, name in budgets.names(_own_budgets(size, table, budgets)).items()
    )
