"""The grid of learning rates as a table and as values."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pretrain.comparison.rate_grid import RateChoice
from pretrain.comparison.report.rate_table import rate_table, rate_values
from pretrain.html_page import environment
from tests.pretrain.comparison.test_rate_caveats import EDGE


def test_choices_edges_and_divergence_are_marked(synthetic_plan: Callable[..., Any]) -> None:
    plain = synthetic_plan()
    assert rate_table(plain) is None and rate_values(plain) == {}
    inside = RateChoice({1e-3: (2.0, 2.2), 2e-3: (1.0, 1.5), 4e-3: (1.0, math.nan)}, 1e15)
    plan = replace(plain, rates={("", "dense"): inside, ("", "mot"): EDGE})
    table = rate_table(plan)
    assert table is not None and table.columns == ("0.001", "0.002", "0.004", "FLOPs spent")
    assert table.rows[0] == ("dense", ("2.100", "1.250 *", "diverged", "1.00 PFLOP"))
    assert table.rows[1][1][2] == "1.000 **"
    values = rate_values(plan)["rates"]
    assert [(of["rate"], of["at_edge"]) for of in values] == [(2e-3, False), (4e-3, True)]
    page = environment(Path("pretrain/comparison/report")).from_string(
        '{% from "parts.html.j2" import rate_grid %}{{ rate_grid(rates, config) }}'
    )
    assert "1.250 *" in page.render(rates=table, config=plan.config)
