"""Sizes and budgets of a comparison file: the cells that follow, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.config import make_plan
from pretrain.comparison.matched_flops import expected_mix, step_flops
from pretrain.comparison.plan_file import write_plan
from pretrain.models.accounting import active_body_parameters
from tests.pretrain.comparison.ladder_files import LADDER, ladder_edit
from tests.pretrain.tiny_data import write_tiny_data


def test_a_cell_is_a_size_and_a_budget_and_its_runs_are_named_after_it(
    comparison_files: Callable[..., Any],
) -> None:
    plan = make_plan(comparison_files(edit=ladder_edit()).comparison)
    assert [cell.name for cell in plan.cells] == [
        *("d32_2tpp", "d32_4tpp", "d32_8tpp"),
        *("d64_2tpp", "d64_4tpp"),
    ]
    # all cells of the first seed first, so that a whole ladder of one seed can be seen soonest
    assert [run.name for run in plan.runs[:3]] == [
        "d32_2tpp_dense_seed1",
        "d32_2tpp_mot_seed1",
        "d32_4tpp_dense_seed1",
    ]
    assert len(plan.runs) == 5 * 2 * 3 and len({run.config.run_dir for run in plan.runs}) == 30
    for cell, of_cell in plan.cells.items():
        config = of_cell.run("dense", 2).config
        assert f"d{config.model.d_model}" == cell.size
        assert cell.parameters == active_body_parameters(config.model, "image")
        assert config.total_tokens == cell.tokens == config.num_steps * 1024
        # a step of 1,024 is 1.8 % of 57,568 parameters, and rounding half of that
        assert cell.tokens_per_parameter == pytest.approx(float(cell.budget.removesuffix("tpp")), rel=0.01)
        assert config.optimizer.schedule.warmup_steps == round(20 / 600 * config.num_steps)
    assert {c.learning_rate for r in plan.runs if (c := r.config.optimizer)} == {1e-3, 2e-3}


def test_body_parameters_are_those_of_blocks_and_norms(comparison_files: Callable[..., Any]) -> None:
    model = make_plan(comparison_files().comparison).runs[0].config.model
    d, layers, hidden = model.d_model, model.num_layers, model.ffn_width
    norms = layers * 2 * d + d + layers * 2 * model.head_dim * (model.query_key_norm is not None)
    assert active_body_parameters(model, "text") == layers * (4 * d * d + 3 * d * hidden) + norms


SIZE = "[sizes.d32.model]"


def test_a_size_may_be_a_global_batch(comparison_files: Callable[..., Any]) -> None:
    text = LADDER.replace("[sizes.d32.model]", "[sizes.large]\ntokens_per_step = 4096\n[sizes.d32.model]")
    plan = make_plan(comparison_files(edit=ladder_edit(text)).comparison)
    steps = {cell.name: of_cell.runs[0].config.num_steps for cell, of_cell in plan.cells.items()}
    assert steps["large_4tpp"] == round(steps["d64_4tpp"] / 4)


def test_a_budget_of_flops_is_what_the_baseline_spends_at_every_size(
    comparison_files: Callable[..., Any], tmp_path: Path
) -> None:
    write_tiny_data(tmp_path / "runs" / "tokens")
    budgets = LADDER.replace("tokens_per_parameter = [8, 2, 4]", "train_flops = [1e12, 5e11]")
    text = budgets.replace("budgets = [4, 2]\n", "")
    files = comparison_files(base_edit=lambda text: text.replace("= 256", "= 64"), edit=ladder_edit(text))
    plan = make_plan(files.comparison)
    assert [cell.name for cell in plan.cells] == [
        f"{s}_{b}flop" for s in ("d32", "d64") for b in ("5e11", "1e12")
    ]
    mix = expected_mix(plan.runs[0].config)
    for run in plan.runs:
        assert run.cell is not None
        spent = float(run.config.num_steps * step_flops(run.config, mix))
        # half a step of the 300 that the smallest budget buys at the largest size: 0.2 %
        assert spent == pytest.approx(float(run.cell.budget.removesuffix("flop")), rel=5e-3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[budgets]", "[contrasts]", "sizes makes this a ladder, which needs budgets too"),
        (
            "tokens_per",
            "total_tokens = [9]\ntokens_per",
            "give one of total_tokens, tokens_per_parameter, train_flops",
        ),
        ("[8, 2, 4]", "[2, 4, 2.0]", "names a budget twice"),
        ("[4, 2]", "[4, 4.0]", 'sizes."d64".budgets: .* names a budget twice'),
        ("[4, 2]", "[4, -2]", r'sizes."d64".budgets = \[4, -2\]: expected a list of tokens_per_parameter'),
        (SIZE, f"[sizes.d9]\ntotal_tokens = 5\n{SIZE}", r'"d9" sets "total_tokens", but `budgets` does'),
        (SIZE, f'[sizes.d9.data]\nheldout = "x"\n{SIZE}', "all sizes read the same data"),
        (SIZE, f'{SIZE}\ntowers.text = "all"', r'sets "model.towers.text", and arms."dense" does too'),
        ("d_model = 32", "d_model = 33", r'sizes."d32": arms."dense": .*d_model = 33'),
        (SIZE, f"[common.evaluate]\ngenerate = 2\n{SIZE}", "a ladder with evaluate.generate = 2: its report"),
    ],
)
def test_what_a_ladder_may_not_say(
    comparison_files: Callable[..., Any], old: str, new: str, message: str
) -> None:
    assert old in LADDER
    text = LADDER.replace(old, new, 1)
    if new == "[contrasts]":
        text = text[: text.index(new)]
    with pytest.raises(ConfigError, match=message):
        make_plan(comparison_files(edit=ladder_edit(text)).comparison)


def test_overrides_of_what_sizes_and_budgets_set_are_refused(comparison_files: Callable[..., Any]) -> None:
    path = comparison_files(edit=ladder_edit()).comparison
    assert make_plan(path, ["evaluate.last_documents=9"]).runs[0].config.evaluate.last_documents == 9
    with pytest.raises(ConfigError, match="`budgets` sets total_tokens of every run"):
        make_plan(path, ["total_tokens=4096"])
    with pytest.raises(ConfigError, match=r'size "d32" sets "model.d_model" itself'):
        make_plan(path, ["model.d_model=64"])


def test_sizes_and_budgets_may_be_added_and_runs_may_not_be_lost(
    comparison_files: Callable[..., Any],
) -> None:
    def plan(text: str) -> Any:
        return make_plan(comparison_files(edit=ladder_edit(text)).comparison)

    write_plan(plan(LADDER))
    write_plan(plan(LADDER + "[sizes.d16.model]\nd_model = 16\n"))
    more = LADDER.replace("[8, 2, 4]", "[8, 2, 4, 1]").replace("[4, 2]", "[4, 2, 8]")
    write_plan(plan(more + "[sizes.d16.model]\nd_model = 16\n"))
    with pytest.raises(ConfigError, match="d64_8tpp_dense_seed1: only there"):
        write_plan(plan(more.replace("[4, 2, 8]", "[4, 2]") + "[sizes.d16.model]\nd_model = 16\n"))
