"""The table of error rates in docs/results is what its command prints, and its decisions are a report's."""

import re
from pathlib import Path

import numpy as np
import pytest

from pretrain.comparison.compare_config import CompareConfig
from pretrain.comparison.effects import effects
from pretrain.comparison.simultaneous import half_widths, local_level
from tests import timed_ratios, tuned_rates
from tests.comparisons import ALPHA, LOSS, MODALITIES, Case, analyse, cases, draw, measure, row

PAGE = Path("docs/results/error_rates.md")


def rows_of(section: str) -> dict[str, str]:
    """The rows of the table under a heading of the page, by case."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")][1:]
    return {line.split(" | ")[0].removeprefix("| "): line for line in lines}


@pytest.mark.parametrize("section", ["500 comparisons a row", "20,000 comparisons a row"])
def test_the_page_has_a_row_for_every_case(section: str) -> None:
    assert list(rows_of(section)) == list(cases())


@pytest.mark.parametrize(
    "name", ["null, 12 arms x 3 seeds", "a run diverged", "the same, 5 seeds of each arm"]
)
def test_a_row_of_the_page_is_what_the_command_prints(name: str) -> None:
    def shares(line: str) -> list[float]:
        return [float(number) for number in re.findall(r"\d\.\d{3}", line.removeprefix(f"| {name}"))]

    # Counts of 500 comparisons; another processor may round one of them to the other side: .002
    assert shares(row(name, measure(cases()[name], 500))) == pytest.approx(
        shares(rows_of("500 comparisons a row")[name]), abs=0.0051
    )


def test_the_rows_of_chosen_rates_are_what_their_command_prints() -> None:
    rows = rows_of("Learning rates by a grid")
    assert list(rows) == list(tuned_rates.cases())
    name = "4 % at a factor of 2, 3 tuning seeds"
    found = tuned_rates.measure(tuned_rates.cases()[name], 10_000)
    assert tuned_rates.row(name, found) == rows[name]


def test_the_page_has_a_row_for_every_case_of_seconds() -> None:
    assert list(rows_of("Seconds")) == list(timed_ratios.cases())


def test_the_decisions_that_are_counted_are_those_of_a_report() -> None:
    case = Case(4, 3, effects={(1, 0): 0.03, (2, 2): -0.05})
    names = ["dense", "a", "b", "c"]
    config = CompareConfig(
        name="synthetic",
        question="?",
        base="base.toml",
        arms={name: {} for name in names},
        baseline="dense",
        vary=("model.towers",),
        seeds=(1, 2, 3),
    )
    runs = [(names[arm], seed + 1) for arm, seed in case.runs]
    losses = draw(case, 5, seed=1)
    fitted = analyse(losses, case.design)
    half = half_widths(fitted, local_level(case.design, ALPHA, len(LOSS))).reshape(5, len(LOSS), 3)
    estimates = fitted.estimates.reshape(5, len(LOSS), 3)
    decided = []
    for i, table in enumerate(losses):
        found = effects(config, runs, dict(zip(MODALITIES, table.tolist(), strict=True)), family=MODALITIES)
        for m, modality in enumerate(MODALITIES):
            for c, arm in enumerate(names[1:]):
                effect = found[arm, modality]
                assert effect.estimate == pytest.approx(estimates[i, m, c], abs=1e-9)
                beyond = np.abs(estimates[i, m, c]) > half[i, m, c]
                assert (effect.outcome in ("lower", "higher")) == beyond
                decided.append(beyond)
    assert 0 < sum(decided) < len(decided)
