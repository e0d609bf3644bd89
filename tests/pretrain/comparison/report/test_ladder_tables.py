"""The tables of a ladder's report."""

from dataclasses import replace

from pretrain.comparison.ladder_findings import LadderFindings
from pretrain.comparison.plan_file import Addition
from pretrain.comparison.report.ladder_tables import cells_table, ladder_caveats, shares_table, sizes_table
from pretrain.comparison.scope import RunEnd


def test_every_cell_has_a_row_and_every_caveat_its_cells(turning_ladder: LadderFindings) -> None:
    ladder = turning_ladder
    table = cells_table(ladder, "mot")
    assert [label for label, _ in table.rows] == [cell.name for cell in ladder.cells]
    _, cells = table.rows[0]
    assert cells[:3] == ("2", "114,688", "112") and cells[4] == "3"
    assert "% [" in cells[5] and cells[5].endswith("mot worse")
    shares = shares_table(ladder, "mot")
    assert shares is not None and [row[0] for row in shares.rows] == ["d32_4tpp", "d32_8tpp", "d64_4tpp"]
    sizes = dict(sizes_table(ladder).rows)
    assert sizes["d32"][1:3] == ("2, 32, 2, 256", "0.002") and sizes["d64"][-1] == "2tpp, 4tpp"
    assert sizes["d32"][5] == "324 image"  # a third of 95 % of 1,024
    texts = [caveat.text for caveat in ladder_caveats(ladder)]
    assert any(text.startswith("3 seeds: intervals are wide") for text in texts), (
        "of all cells: none is named"
    )


def test_additions_and_missing_cells_are_grave(turning_ladder: LadderFindings) -> None:
    (cell, _), *_ = turning_ladder.cells.items()
    found = replace(
        turning_ladder,
        added=(Addition(runs=("d64_2tpp_mot_seed1",), finished=4),),
        missing={cell: "no seed has been evaluated in all arms"},
        ends=turning_ladder.ends | {"d32_2tpp_dense_seed1": RunEnd("unfinished")},
    )
    grave = [caveat.text for caveat in ladder_caveats(found) if caveat.grave]
    assert grave[0].startswith(
        "Not finished: 29 of 30 runs finished; no result yet in d32_2tpp. The intervals"
    )
    assert any("were added after 4 runs had finished" in text for text in grave)
    failed = replace(found, ends=turning_ladder.ends | {"d32_2tpp_mot_seed1": RunEnd("failed", "no disk")})
    grave = [caveat.text for caveat in ladder_caveats(failed) if caveat.grave]
    assert grave[0].startswith("d32_2tpp has no result, and no figure, table or sentence counts it")
    assert grave[0].endswith("d32_2tpp_mot_seed1 failed (no disk).")
