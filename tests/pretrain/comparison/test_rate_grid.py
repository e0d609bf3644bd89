"""A grid of learning rates: its runs, its choice, and what a report says of it."""

import io
import json
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.caveats import caveats
from pretrain.comparison.config import make_plan
from pretrain.comparison.findings import find
from pretrain.comparison.plan import PlannedRun
from pretrain.comparison.rate_grid import DIVERGED, RateChoice, has_diverged, rate_lines, rates_sentence
from pretrain.comparison.results import load_results
from pretrain.comparison.run import run_comparison
from pretrain.comparison.verdict import headline
from pretrain.train.finite import NonFiniteError, require_finite
from pretrain.train.spikes import SpikeError, check_allowed

GRID = "rates = [2e-3, 5e-4, 1e-3]\ntuning_seeds = [7, 8]\n"
SHORT = ["total_tokens=61_440"]
BEST = {"dense": 1e-3, "mot": 2e-3}


def parabola(run: PlannedRun, modality: str) -> float:
    """A loss that is least at the arm's best rate; the tuning seeds differ a little."""
    rate = run.config.optimizer.learning_rate
    return 0.05 * math.log2(rate / BEST[run.arm]) ** 2 + 0.001 * (run.seed == 8)


def with_grid(text: str) -> str:
    return GRID + text.replace('tuning = "', '# "')


def test_the_runs_of_the_grid_come_first_and_are_as_long(comparison_files: Callable[..., Any]) -> None:
    plan = make_plan(comparison_files(edit=with_grid).comparison, SHORT)
    assert [run.name for run in plan.first[:4]] == [
        "dense_rate0.0005_seed7", "dense_rate0.001_seed7", "dense_rate0.002_seed7", "mot_rate0.0005_seed7",
    ]  # fmt: skip
    assert len(plan.first) == 2 * 3 * 2 and plan.next_runs == plan.first
    run = plan.first[1]
    assert run.config.run_dir == plan.directory / "tuning" / run.name
    assert run.num_steps == 60 and run.config.evaluate.conditional_documents == 0
    assert {r.config.optimizer.learning_rate for r in plan.first} == {5e-4, 1e-3, 2e-3}
    huge = make_plan(plan.path, [*SHORT, "comparison.rates=[1e-3, 1e6, 1e30]"])
    assert [r.name for r in huge.first[1:3]] == ["dense_rate1e06_seed7", "dense_rate1e30_seed7"]


def test_every_arm_runs_at_its_best_rate_on_other_seeds(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    files = comparison_files(edit=with_grid)
    plan = make_plan(files.comparison, SHORT)
    write_runs(plan, run_shift=parabola)
    assert json.loads((plan.directory / "comparison.json").read_text())["runs"] == {}
    tuned = make_plan(files.comparison, SHORT)
    assert tuned.first == () and {r.seed for r in tuned.runs} == {1, 2, 3}
    assert {(r.arm, r.config.optimizer.learning_rate) for r in tuned.runs} == set(BEST.items())
    choice = tuned.rates["", "dense"]
    assert list(choice.losses) == [5e-4, 1e-3, 2e-3] and choice.rate == 1e-3 and not choice.at_edge
    assert choice.train_flops == pytest.approx(6 * 0.95 * 61_440 * 3e6)
    assert rate_lines(tuned)[1].startswith(
        "Learning rate of mot: 0.002, THE EDGE OF THE GRID, of 3 rates x 2 tuning seed(s), "
    )
    with pytest.raises(ConfigError, match="learning rates are chosen, and no run at them has begun"):
        run_comparison(files.comparison, SHORT, report_only=True)

    write_runs(tuned, run_shift=parabola)
    findings = find(tuned, load_results(tuned))
    assert "The rate of mot (0.002) is the edge of the grid: a better one may lie" in headline(
        findings, "mot"
    )
    texts = [caveat.text for caveat in caveats(findings) if caveat.grave]
    assert any("learning rate of mot is at the edge of the grid" in text for text in texts)
    inside = RateChoice({5e-4: (2.0,), 1e-3: (1.0,), 2e-3: (math.nan,)}, 1e15)
    assert not inside.at_edge and inside.means[2e-3] == math.inf
    both = dict(tuned.rates) | {("", "mot"): inside}
    said = rates_sentence(SimpleNamespace(rates=both), ("dense", "mot"))  # pyright: ignore[reportArgumentType]
    assert said == "Each arm has the best rate of an equal grid, with a worse one on both sides."


def test_a_larger_grid_keeps_what_has_run(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    files = comparison_files(edit=with_grid)
    write_runs(make_plan(files.comparison, SHORT), run_shift=parabola)
    write_runs(tuned := make_plan(files.comparison, SHORT), run_shift=parabola)
    more = "comparison.rates=[5e-4, 1e-3, 2e-3, 4e-3]"
    grown = make_plan(files.comparison, [*SHORT, more])
    assert len(grown.first) == 16 and not grown.rates and tuned.rates
    write_runs(grown, run_shift=parabola)
    after = make_plan(files.comparison, [*SHORT, more])
    assert after.runs == tuned.runs and not after.rates["", "mot"].at_edge
    write_runs(grown, run_shift=lambda run, m: parabola(run, m) - 0.5 * (run.rate == 4e-3))
    with pytest.raises(ConfigError, match=r"mot_seed1\.optimizer\.learning_rate: 0\.004 .* 0\.002 there"):
        write_runs(make_plan(files.comparison, [*SHORT, more]))


def test_a_rate_at_which_a_run_diverges_is_done_with(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    files = comparison_files(edit=with_grid)
    plan = make_plan(files.comparison, SHORT)
    write_runs(plan, run_shift=lambda run, m: parabola(run, m) - (run.rate == 2e-3))
    world = SimpleNamespace(rank=0, tp_rank=0, gather=lambda lines: [lines])
    step: Any = SimpleNamespace(grad_norm=math.nan, stats=(), local_stats=(), grad_norm_by_group={})
    with pytest.raises(NonFiniteError) as error:
        require_finite(step, (), (), step=9, world=world)  # pyright: ignore[reportArgumentType]
    assert DIVERGED[0] in str(error.value)
    for run in plan.first:
        if run.rate == 2e-3 and run.seed == 7:
            attempt = {"stopped": "now", "to_step": None, "reason": f"NonFiniteError: {error.value}"}
            record = {"status": "failed", "attempts": [attempt]}
            (run.config.run_dir / "record.json").write_text(json.dumps(record))
            lines = (run.config.run_dir / "metrics.jsonl").read_text().splitlines()
            (run.config.run_dir / "metrics.jsonl").write_text("\n".join(lines[:5]) + "\n")
    tuned = make_plan(files.comparison, SHORT)
    assert {choice.rate for choice in tuned.rates.values()} == {1e-3}
    assert not any(choice.at_edge for choice in tuned.rates.values())


def test_every_cell_of_a_ladder_has_a_grid(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    ladder = "[sizes.d32.model]\nd_model = 32\n[budgets]\ntokens_per_parameter = [1, 2]\n"
    files = comparison_files(edit=lambda text: with_grid(text) + ladder)
    plan = make_plan(files.comparison)
    assert len(plan.first) == 2 * 12 and plan.first[0].name == "d32_1tpp_dense_rate0.0005_seed7"
    write_runs(plan, run_shift=parabola)
    tuned = make_plan(files.comparison)
    assert len(tuned.rates) == 4 and tuned.rates["d32_2tpp", "mot"].rate == 2e-3
    assert all(run.config.optimizer.learning_rate == BEST[run.arm] for run in tuned.runs)
    (cell, of_cell), *_ = tuned.cells.items()
    assert of_cell.rates.keys() == {(cell.name, "dense"), (cell.name, "mot")}
    said = rates_sentence(tuned, ("dense", "mot"))
    assert said.startswith("The rate of mot (0.002) is the edge of the grid in 2 cells: ")


def test_a_dry_run_tells_what_the_grid_costs(comparison_files: Callable[..., Any], tmp_path: Any) -> None:
    from tests.pretrain.comparison.test_planned_cost import with_data
    from tests.pretrain.tiny_data import write_tiny_data

    write_tiny_data(tmp_path / "tiny")
    files = comparison_files(edit=with_grid, base_edit=lambda text: with_data(text, tmp_path))
    out = io.StringIO()
    assert run_comparison(files.comparison, dry_run=True, to=out) == 0
    assert "grid of rates, before them: 12 runs, " in out.getvalue()


@pytest.mark.parametrize("on_spike", ["stop", "skip"])
def test_a_rate_that_a_spike_ended_is_done_with(
    on_spike: str, comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    plan = make_plan(comparison_files(edit=with_grid).comparison, [*SHORT, f"on_spike={on_spike}"])
    write_runs(plan, run_shift=parabola)
    config = plan.first[0].config
    assert not has_diverged(config)
    with pytest.raises(SpikeError) as error:
        check_allowed(config, 9, config.spike.max_spikes + 1, "its loss of 9 is more than 2 times the median")
    attempt = {"stopped": "now", "to_step": None, "reason": f"SpikeError: {error.value}"}
    (config.run_dir / "record.json").write_text(json.dumps({"status": "failed", "attempts": [attempt]}))
    assert has_diverged(config)


def test_the_grid_of_another_config_chooses_no_rates(
    comparison_files: Callable[..., Any], write_runs: Callable[..., None]
) -> None:
    files = comparison_files(edit=with_grid)
    write_runs(make_plan(files.comparison, SHORT), run_shift=parabola)
    with pytest.raises(
        ConfigError, match=r"tuning/dense_rate0\.0005_seed7 was made by another config:\n  data"
    ):
        make_plan(files.comparison, [*SHORT, "data.document_mask=false"])
