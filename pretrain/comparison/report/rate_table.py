"""The grid of learning rates in a report: its losses, its choices, its cost. This module imports no torch."""

import math
from typing import Any

from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.report.tables import Table
from pretrain.quantities import flops


def rate_table(plan: Plan) -> Table | None:
    """The mean loss of every arm at every rate; None where rates were not chosen by a grid. A * marks the
    rate that was chosen, ** one at the edge of the grid."""
    if not isinstance(plan, ComparisonPlan) or not plan.rates:
        return None
    rows = []
    for (cell, arm), choice in plan.rates.items():
        mark = " **" if choice.at_edge else " *"
        texts = [
            f"{mean:.3f}{mark if rate == choice.rate else ''}" if math.isfinite(mean) else "diverged"
            for rate, mean in choice.means.items()
        ]
        rows.append((f"{cell}, {arm}" if cell else arm, (*texts, flops(choice.train_flops))))
    first = next(iter(plan.rates.values()))
    return Table((*(f"{rate:g}" for rate in first.losses), "FLOPs spent"), tuple(rows), "learning rate")


def rate_values(plan: Plan) -> dict[str, Any]:
    """The grid as values of summary.json; nothing where there was none."""
    if not isinstance(plan, ComparisonPlan) or not plan.rates:
        return {}
    return {
        "tuning_seeds": list(plan.config.tuning_seeds),
        "rates": [
            {"cell": cell or None, "arm": arm, "rate": choice.rate, "at_edge": choice.at_edge}
            | {"losses": {f"{rate:g}": list(of) for rate, of in choice.losses.items()}}
            | {"train_flops": choice.train_flops}
            for (cell, arm), choice in plan.rates.items()
        ],
    }
