from collections.abc import Callable
from functools import partial

import pytest

from pretrain.comparison.findings import Findings
from pretrain.comparison.report import tables
from pretrain.comparison.report.tables import Table
from tests.pretrain.comparison.test_findings import with_top_k


@pytest.fixture
def findings(make_findings: Callable[..., Findings]) -> Callable[..., Findings]:
    return partial(make_findings, seeds=(1, 2))


def cells(table: Table, row: str) -> tuple[str, ...]:
    return dict(table.rows)[row]


def test_losses_carry_their_spread_and_interval(findings: Callable[..., Findings]) -> None:
    table = tables.loss_table(findings(seeds=(1, 2, 3), seed_noise=0.01))["mot"]
    assert table.columns == ("dense", "mot", "difference", "95 % interval", "relative")
    assert [label for label, _ in table.rows] == ["text", "image", "speech", "all targets"]
    assert " \u00b1 " in cells(table, "text")[0] and " to " in cells(table, "text")[3]
    assert cells(tables.loss_table(findings_of_one(findings))["mot"], "text")[3] == "none (an observation)"


def findings_of_one(findings: Callable[..., Findings]) -> Findings:
    return findings(seeds=(1,), edit=lambda text: text.replace("dense_vs_mot", "one_seed"))


def test_matching_marks_an_end_point_that_was_not_reached(findings: Callable[..., Findings]) -> None:
    speed = {"text": 2.0, "image": 0.5, "speech": 1.0}
    table = tables.matching_table(
        findings(multiplier=lambda arm, m: speed[m] if arm == "mot" else 1.0, step_s=lambda arm: 0.1),
        "mot",
    )
    assert cells(table, "text")[3] == "0.50" and cells(table, "text")[6] == "0 %"
    assert cells(table, "image")[3] == "2.00 *"
    assert (
        cells(table, "image")[6] == "53 %"
    )  # 16 of 30: dense had the final loss at its 300th step, less rounding


def test_conditional_losses_by_direction(findings: Callable[..., Findings]) -> None:
    table = tables.conditional_table(findings(seeds=(1,)))
    assert table is not None
    assert table.columns == ("dense", "mot")
    assert cells(table, "text \u2192 image, gain") == ("+0.600", "+0.600")
    many = "".join(
        f'[arms.a{i}.model]\ntowers = {{text = "text", image = "t{i}", speech = "other"}}\n' for i in range(3)
    )
    wide = tables.conditional_table(findings(seeds=(1,), edit=lambda text: text + many, until=lambda *_: 40))
    assert wide is not None and wide.columns[:2] == ("image \u2192 speech, loss", "image \u2192 speech, gain")
    assert [label for label, _ in wide.rows] == ["dense", "mot", "a0", "a1", "a2"]


def test_arms_that_look_ahead_show_both_losses(findings: Callable[..., Findings]) -> None:
    ahead = findings(edit=with_top_k, causal_cost=0.25)
    table = tables.rule_table(ahead)
    assert table is not None and [label for label, _ in table.rows] == ["mot, as compared", "mot, own rule"]
    compared, own = (float(cells[1].split()[0]) for _, cells in table.rows)
    assert compared == pytest.approx(own + 0.25, abs=2e-3)


def test_arms_that_do_not_have_no_such_table(findings: Callable[..., Findings]) -> None:
    assert tables.rule_table(findings()) is None


def test_overview_has_all_arms_and_marks_what_seeds_do_not_explain(
    findings: Callable[..., Findings],
) -> None:
    f = findings(seeds=(1, 2, 3), multiplier=lambda arm, m: 2.0 if (arm, m) == ("mot", "image") else 1.0)
    table = tables.overview_table(f)
    assert table.columns == ("text", "image", "speech", "all targets")
    assert cells(table, "mot")[1].endswith(" % *") and cells(table, "mot")[0].endswith("0.0 %")
    assert "%" not in "".join(cells(table, "dense"))
