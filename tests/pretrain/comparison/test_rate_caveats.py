"""What a report says of a grid of learning rates."""

from types import SimpleNamespace
from typing import Any

from pretrain.comparison.rate_caveats import of_rates
from pretrain.comparison.rate_grid import RateChoice

EDGE = RateChoice({1e-3: (3.0,), 2e-3: (2.0,), 4e-3: (1.0,)}, 2e15)
INSIDE = RateChoice({1e-3: (3.0,), 2e-3: (2.0,), 4e-3: (3.0,)}, 1e15)


def plan(mot: RateChoice, tuning_seeds: tuple[int, ...]) -> Any:
    rates = {("", "dense"): INSIDE, ("", "mot"): mot}
    return SimpleNamespace(
        rates=rates, config=SimpleNamespace(tuning_seeds=tuning_seeds, rates=tuple(EDGE.losses))
    )


def test_an_edge_is_grave_and_the_cost_is_told() -> None:
    edge, cost = of_rates(plan(EDGE, (7,)))
    assert edge.grave and edge.text.startswith("The learning rate of mot is at the edge of the grid")
    assert "(3 rates x 1 seeds, 3.00 PFLOP)" in cost.text and "up to 1.7 times as frequent" in cost.text
    (cost,) = of_rates(plan(INSIDE, (7, 8, 9)))
    assert not cost.grave and "1.7 times" not in cost.text
