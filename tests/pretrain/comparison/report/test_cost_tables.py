"""Tables of what arms are, cost and used."""

from collections.abc import Callable
from functools import partial

import pytest

from pretrain.comparison.findings import Findings
from pretrain.comparison.report import cost_tables
from pretrain.comparison.report.tables import Table


@pytest.fixture
def findings(make_findings: Callable[..., Findings]) -> Callable[..., Findings]:
    return partial(make_findings, seeds=(1, 2))


def cells(table: Table, row: str) -> tuple[str, ...]:
    return dict(table.rows)[row]


def test_design_shows_what_an_arm_is_and_what_it_spent(findings: Callable[..., Findings]) -> None:
    def wider(text: str) -> str:
        return (
            text.replace('vary = ["model.towers"]', 'vary = ["model.towers", "model.num_layers"]')
            + "model.num_layers = 3\n"
        )

    table = cost_tables.design_table(findings(edit=wider))
    assert table.columns == ("dense", "mot")
    assert cells(table, "towers") == ("one for all modalities", "text | image | speech")
    assert cells(table, "training tokens") == ("614,400", "614,400")
    assert cells(table, "steps x tokens per step")[0] == "600 x 1,024"
    assert cells(table, "learning rate")[0] == "0.001, 20 steps of warm-up, cosine to 10 %"
    assert cells(table, "training FLOPs per target **") == ("3.00 MFLOP", "3.00 MFLOP")
    assert cells(table, "seeds") == ("1, 2", "1, 2")
    assert cells(table, "model.num_layers") == ("2", "3")  # whatever the arms differ in has a row
    # parameters: an arm's own, not the other's
    total, active = cells(table, "parameters"), cells(table, "active per token")
    assert total[0] != total[1] and active[0] == total[0] != active[1]
    assert cells(table, "forward FLOPs per token *")[0] != cells(table, "forward FLOPs per token *")[1]


def test_costs_are_beside_each_other(findings: Callable[..., Findings]) -> None:
    table = cost_tables.system_table(findings(step_s=lambda arm: 0.15 if arm == "mot" else 0.1))
    assert cells(table, "time of a step (median)") == ("100 ms", "150 ms")
    assert cells(table, "its ratio to dense") == ("1", "1.50 [1.50, 1.50]")
    assert cells(table, "model FLOPs utilisation") == ("31.0 %", "31.0 %")
    assert cells(table, "peak memory")[0] == "858.31 MiB"


def test_provenance_names_versions_and_no_host(findings: Callable[..., Findings]) -> None:
    rows = dict(cost_tables.provenance(findings()))
    assert rows["commit"] == "0123456789abcdef" and rows["attempts"] == "4 for 4 runs"
    assert (rows["processor"], rows["arithmetic path"]) == ("a processor", "AVX512")
    assert "torch 2.13.0" in rows["versions"] and rows["layout"] == "dp 1, tp 1, pp 1"
    assert "machine" not in "".join(rows.values())


def test_data_used_and_lost_has_a_row_for_every_loss(findings: Callable[..., Findings]) -> None:
    f = findings(lost_steps=lambda arm: 6 if arm == "mot" else 0)
    for run in f.results:
        if run.arm == "dense":
            run.rows[0]["data/unreadable_documents"] = ["s/a", "s/b"]
    table = cost_tables.data_table(f)
    assert cells(table, "runs that finished") == ("2", "2")
    assert cells(table, "documents that could not be read, all runs") == ("4", "0")
    assert cells(table, "steps lost to spikes, all runs") == ("0", "12")
    assert cells(table, "slots that hold a token") == ("95.0 %", "95.0 %")
