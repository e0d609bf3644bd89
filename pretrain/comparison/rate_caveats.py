"""What a reader must know about the learning rates that a grid has chosen. This module imports no torch."""

from collections.abc import Iterator

from pretrain.comparison.caveat import Caveat
from pretrain.comparison.plan import ComparisonPlan
from pretrain.quantities import flops, join

ENOUGH_TUNING_SEEDS = 3
"""Number of tuning seeds from which on the choice adds few false claims (docs/results/error_rates.md)."""


def of_rates(plan: ComparisonPlan) -> Iterator[Caveat]:
    """Caveats about the grid of a comparison, or of a cell of a ladder."""
    arms = {arm: choice for (_, arm), choice in plan.rates.items()}
    if edges := [arm for arm, choice in arms.items() if choice.at_edge]:
        yield Caveat(
            f"The learning rate of {join(edges)} is at the edge of the grid: a better one may lie beyond it, "
            "so no verdict is claimed at best rates. More `rates` may be added to the file; runs that have "
            "begun at the old rate need another name of the comparison.",
            grave=True,
        )
    spent = flops(sum(choice.train_flops for choice in arms.values()))
    count = len(plan.config.tuning_seeds)
    few = (
        f" With {count} tuning seed{'s' * (count > 1)} false claims about best rates are up to 1.7 "
        "times as frequent as the level says."
        if count < ENOUGH_TUNING_SEEDS
        else ""
    )
    yield Caveat(
        f"Learning rates were chosen by a grid that is the same for all arms ({len(plan.config.rates)} rates "
        f"x {count} seeds, {spent}). Intervals hold what other seeds would change at these rates, and not "
        f"that other tuning seeds might have chosen others.{few}"
    )
