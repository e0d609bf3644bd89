"""From run directories made with known multipliers to the numbers of the report."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.caveats import caveats
from pretrain.comparison.findings import ALL, Findings, find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import RunResult, load_results
from pretrain.comparison.run_documents import RunDocuments
from pretrain.comparison.verdict import headline

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]
SPEED = {"text": 1.25, "image": 2.0, "speech": 1.0}


def faster(arm: str, modality: str) -> float:
    return SPEED[modality] if arm == "mot" else 1.0


def test_multipliers_are_recovered_per_modality_and_axis(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(multiplier=faster, noise=0.003, step_s=lambda arm: 0.12 if arm == "mot" else 0.1)
    price = 0.121 / 0.101  # a step and its wait
    for modality, speed in SPEED.items():
        matching = f.contrast("mot", modality).matching
        for axis, factor in (("steps", 1.0), ("flops", 1.0), ("seconds", price)):
            slope = matching[axis].slope
            assert slope is not None and slope.interval is not None and len(slope.per_seed) == 3
            # 2 %: noise of .003 nats on curves that fall by .02 between evaluations (worst measured: 0.9 %)
            assert slope.value == pytest.approx(factor / speed, rel=0.02), (modality, axis)


def test_runs_that_were_not_evaluated_up_to_a_common_step_are_refused(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, until=lambda arm, seed: 60 if arm == "mot" else None)
    dense, mot = load_results(plan)
    late = replace(dense, rows=tuple(row for row in dense.rows if row["step"] > 60))
    with pytest.raises(ConfigError, match=r"up to step 60 .* without an evaluation: dense_seed1"):
        find(plan, [late, mot])


def test_a_crossing_is_found_in_tokens(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(shift=lambda arm, _, frac: 0.4 - frac if arm == "mot" else 0.0)
    (crossing,) = f.contrast("mot", "text").crossings
    assert crossing.other_leads and crossing.x == pytest.approx(0.4 * f.tokens, rel=1e-6)
    assert f.contrast("mot", "text").trend < 0


def test_overfitting_shows_as_a_minimum_before_the_end(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(seeds=(1,), shift=lambda arm, *_: 4 * max(0.0, _[1] - 0.5) if arm == "mot" else 0.0)
    loss = f.losses["mot", "speech"]
    assert loss.best < loss.mean and loss.best_tokens == pytest.approx(0.5 * f.tokens)


def test_conditional_losses_are_kept_per_direction(make_findings: Callable[..., Findings]) -> None:
    f = make_findings(seeds=(1,), multiplier=faster)
    assert len(f.directions) == 6
    assert f.conditional["mot", "heldout/gain/text_to_image"].mean == pytest.approx(1.2)
    assert f.conditional["dense", "heldout/gain/text_to_image"].mean == pytest.approx(0.6)


def test_conditional_losses_that_not_all_runs_have_measured_yet_are_left_out(
    make_findings: Callable[..., Findings],
) -> None:
    f = make_findings(seeds=(1,), until=lambda *_: 100)
    for row in f.results[0].rows:
        for name in [name for name in row if name.startswith("eval/gain/text_to")]:
            del row[name]
    again = find(f.plan, f.results)
    assert len(again.directions) == 4 and all(a != "text" for a, _ in again.directions)


def test_arms_of_unequal_length_are_compared_at_equal_flops(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    """A step of mot costs 1.5 of dense, so it has 400 for 600; and it learns as much from each FLOP."""
    plan = synthetic_plan()
    runs = [
        replace(run, config=run.config.model_copy(update={"total_tokens": 400 * 1024}))
        if run.arm == "mot"
        else run
        for run in plan.runs
    ]
    plan = replace(plan, runs=tuple(runs), config=plan.config.model_copy(update={"match": "train_flops"}))
    write_runs(
        plan,
        multiplier=lambda arm, _: 1.5 if arm == "mot" else 1.0,
        flops_per_token=lambda arm: 4.5e6 if arm == "mot" else 3e6,
    )
    f = find(plan, load_results(plan))
    assert not f.scope.interim and f.tokens == 600 * 1024
    for modality in f.modalities:
        contrast = f.contrast("mot", modality)
        assert contrast.final.estimate == pytest.approx(0, abs=1e-9)
        # Between evaluations of mot, 20 steps apart, a straight line is no power law: 0.09 nats at the start.
        assert abs(contrast.gap[1:]).max() < 0.1 and abs(contrast.gap[10:]).max() < 3e-3
        slope = contrast.matching["flops"].slope
        assert slope is not None and slope.value == pytest.approx(1, rel=0.01)
    assert any("not equal data here: mot saw 0.67 times" in c.text for c in caveats(f))
    assert not any("Equal tokens" in c.text for c in caveats(f))
    assert headline(f, "mot").startswith("At equal training FLOPs (dense: 614 k tokens) ")


def with_top_k(text: str) -> str:
    """A comparison whose second arm chooses by a rule that looks ahead."""
    table = '{schedule = "constant", mean_ratio = 0.5, rule = "top_k"}'
    return text.replace("[arms.mot]", f"[arms.mot]\nmodel.depth.image = {table}").replace(
        '["model.towers"]', '["model.towers", "model.depth"]'
    )


def test_an_arm_that_looks_ahead_is_compared_in_its_causal_form(
    make_findings: Callable[..., Findings],
) -> None:
    found = make_findings(edit=with_top_k, causal_cost=0.25)
    image = found.contrast("mot", "image")
    assert image.final.estimate == pytest.approx(0.25) and image.leader == "dense"
    assert found.by_rule["mot", "image"].mean == pytest.approx(image.base_loss)
    assert not any(arm == "dense" for arm, _ in found.by_rule)
    gain = found.conditional["mot", "heldout/gain/text_to_image"]
    assert gain.mean == pytest.approx(found.conditional["dense", "heldout/gain/text_to_image"].mean + 0.25)


def test_unless_the_file_says_otherwise(make_findings: Callable[..., Findings]) -> None:
    found = make_findings(
        edit=lambda text: 'deciding_metric = "eval/loss"\n' + with_top_k(text), causal_cost=0.25
    )
    assert found.contrast("mot", "image").final.estimate == pytest.approx(0.0, abs=1e-9)


def test_documents_that_all_runs_kept_decide_and_widen_the_intervals(
    make_findings: Callable[..., Findings],
) -> None:
    f = make_findings(noise=0.01)
    generator = np.random.Generator(np.random.Philox(0))
    targets = {m: np.full(50, 100.0) for m in f.modalities}
    hard = {arm: generator.standard_normal(50) for arm in f.plan.arms}

    def kept(run: RunResult) -> RunResult:
        final = {m: run.curve(f"eval/loss/{m}").values[-1] for m in f.modalities}
        nats = {m: targets[m] * (final[m] + 0.3 * hard[run.arm]) for m in f.modalities}
        return replace(run, documents=RunDocuments(600, tuple(map(str, range(50))), targets, nats))

    results = [kept(run) for run in f.results]
    over = find(f.plan, results)
    assert over.num_documents == 50 and f.num_documents is None
    shift = 0.3 * (hard["mot"].mean() - hard["dense"].mean())
    for m in (*f.modalities, ALL):
        mine, before = over.effects["mot", m], f.effects["mot", m]
        assert mine.estimate == pytest.approx(before.estimate + shift, abs=1e-9)
        assert over.losses["mot", m].mean == pytest.approx(f.losses["mot", m].mean + 0.3 * hard["mot"].mean())
        assert mine.interval is not None and before.interval is not None
        assert mine.interval.high - mine.interval.low > 1.5 * (before.interval.high - before.interval.low)
        assert over.contrast("mot", m).differences[0] == pytest.approx(
            f.contrast("mot", m).differences[0] + shift
        )
    others = find(f.plan, [*results[:-1], f.results[-1]])
    assert others.num_documents is None and others.effects["mot", ALL] == f.effects["mot", ALL]
