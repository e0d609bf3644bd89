"""From the files of a ladder's runs to shares and turns."""

from collections.abc import Callable

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.ladder_findings import LadderFindings, find_ladder
from pretrain.comparison.results import load_results
from tests.pretrain.comparison.ladder_files import ladder_edit

Make = Callable[..., LadderFindings]


def test_the_sign_turns_where_it_does_and_runs_of_short_budgets_have_not_diverged(
    turning_ladder: LadderFindings,
) -> None:
    ladder = turning_ladder
    assert {end.kind for end in ladder.ends.values()} == {"finished"}
    found = ladder.turns["d32", "mot", "text"]
    # Seeds differ by .002 nats, and the difference falls by .2 as tokens double: 0.7 % of tokens.
    assert found.estimate == pytest.approx(4, rel=0.1) and found.arm_leads_after
    assert found.last_against == pytest.approx(2, rel=0.02)
    assert found.decided_for == pytest.approx((8,), rel=0.02)


def test_shares_are_those_of_arms_that_learn_faster(make_ladder: Make) -> None:
    ladder = make_ladder(multiplier=lambda arm, m: 1.6 if arm == "mot" else 1.0)
    shares = ladder.shares["d32", "mot", "image"]
    assert [cell.budget for cell in shares] == ["4tpp", "8tpp"]
    for share in shares.values():
        # a power law with a floor, between budgets that double: 0.4 % off (worst)
        assert share.reached and share.value == pytest.approx(1 / 1.6, rel=0.02)


def test_cells_that_have_not_run_are_named_and_the_others_reported(
    make_ladder: Make, comparison_files: Callable[..., object], write_runs: Callable[..., None]
) -> None:
    ladder = make_ladder(seed_noise=0.01)
    gone = [run for run in ladder.plan.runs if run.cell is not None and run.cell.name == "d64_4tpp"]
    for run in gone:
        (run.config.run_dir / "metrics.jsonl").unlink()
        (run.config.run_dir / "record.json").unlink()
    again = find_ladder(ladder.plan, load_results(ladder.plan))
    assert [cell.name for cell in again.missing] == ["d64_4tpp"] and len(again.cells) == 4
    assert again.fit.dof == 4 * 2
    plan = make_plan(comparison_files(edit=ladder_edit()).comparison, ["comparison.name=other"])  # type: ignore[attr-defined]
    with pytest.raises(
        ConfigError, match=r"no cell can be reported on; d32_2tpp, the first: .*no seed has been"
    ):
        find_ladder(plan, load_results(plan))
