"""Reading runs back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import aligned, compare_fingerprints, load_results
from pretrain.run_identity import draw_identity
from tests.pretrain.conftest import timed

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]


def test_curves_have_all_axes(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    assert np.isnan(load_results(plan)[0].curve("eval/loss/image").seconds).all()  # no timing rounds
    plan = timed(plan, lambda arm: 0.2)
    curve = load_results(plan)[0].curve("eval/loss/image", until=100)
    assert curve.steps.tolist() == [20, 40, 60, 80, 100]
    assert curve.tokens.tolist() == [1024.0 * step for step in curve.steps]
    assert curve.flops == pytest.approx(0.95 * curve.tokens * 3e6)
    assert curve.seconds == pytest.approx(0.2 * curve.steps)
    assert (np.diff(curve.values) < 0).all()
    assert ("text", "speech") in load_results(plan)[0].directions()


def test_a_torn_last_line_is_left_out_and_a_step_twice_is_refused(
    synthetic_plan: MakePlan, write_runs: Write
) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    path = plan.runs[0].config.run_dir / "metrics.jsonl"
    whole = path.read_text()
    with pytest.raises(ConfigError, match=r"metrics\.jsonl is not the file that the run ended with"):
        path.write_text(whole + '{"step": 601, "eval/lo')
        load_results(plan)
    _forget_the_digest(path.parent)
    assert load_results(plan)[0].rows[-1]["step"] == 600
    path.write_text(whole + json.dumps({"step": 600, "tokens": 1}) + "\n")
    with pytest.raises(ConfigError, match="step 600 follows one of step 600"):
        load_results(plan)
    path.write_text(whole + json.dumps({"step": 640, "tokens": 1}) + "\n")
    with pytest.raises(ConfigError, match="was extended to 640 steps or more, and this comparison is of 600"):
        load_results(plan)


def _forget_the_digest(run_dir: Path) -> None:
    """Make the record that of a run whose last attempt was killed."""
    record = json.loads((run_dir / "record.json").read_text())
    del record["metrics"]
    (run_dir / "record.json").write_text(json.dumps(record))


def test_a_changed_digit_of_an_evaluation_is_refused(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    load_results(plan)
    path = plan.runs[1].config.run_dir / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    value = json.dumps(json.loads(rows[-1])["eval/loss"])
    rows[-1] = rows[-1].replace(value, value.replace(value[0], str((int(value[0]) + 1) % 10), 1))
    path.write_text("".join(rows))
    with pytest.raises(ConfigError, match=rf"{path} is not the file that the run ended with: .*record\.json"):
        load_results(plan)
    path.unlink()
    with pytest.raises(ConfigError, match=rf"{path} is not the file that the run ended with"):
        load_results(plan)


def test_metrics_or_config_of_another_run_are_refused(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan)
    folder = plan.runs[0].config.run_dir
    record = json.loads((folder / "record.json").read_text())
    del record["metrics"]
    run = draw_identity(folder).to_json()
    record |= {"format": 2, "run": run}
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(ConfigError, match=rf"row of step 10 is one of another run: .* has {run['id']}"):
        load_results(plan)
    (folder / "record.json").write_text(json.dumps(record | {"format": 1}))
    load_results(plan)
    shutil.copy(plan.runs[1].config.run_dir / "config.resolved.json", folder)
    with pytest.raises(ConfigError, match=r"config\.resolved\.json is not the file that the run began with"):
        load_results(plan)
    (folder / "config.resolved.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.resolved\.json is missing, and record\.json is there"):
        load_results(plan)


def test_equal_fingerprints_prove_equal_data(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan)
    prints = compare_fingerprints(load_results(plan))
    assert prints.proven and prints.compared == {1: 60, 2: 60}
    assert prints.last[1] != prints.last[2]


def test_other_data_is_found_out(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, fingerprint_salt=lambda arm: arm)
    prints = compare_fingerprints(load_results(plan))
    assert not prints.proven
    (text,) = prints.broken
    assert text.startswith("seed 1: mot and dense had read different data by step 10; which documents differ")
    assert prints.unreadable == {}


def test_a_run_that_went_back_is_named(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, fingerprint_salt=lambda arm: arm)
    results = load_results(plan)
    for run, back_to in zip(results, (None, 50), strict=True):
        run.record["spikes"] = {"events": [{"step": 60, "why": "so", "back_to": back_to}]}
    (text,) = compare_fingerprints(results).broken
    assert text.endswith("by step 10; mot went back to a checkpoint and on with later data (on_spike)")


def test_a_seed_of_one_run_has_nothing_to_prove(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,), edit=lambda text: "extra_baseline_seeds = [7]\n" + text)
    write_runs(plan)
    prints = compare_fingerprints(load_results(plan))
    assert prints.proven and prints.compared == {1: 60}


def test_the_documents_that_differ_are_named(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, fingerprint_salt=lambda arm: arm)
    names = [f"d/tokens-00000.tar/{i}" for i in range(8)]
    lost = {"dense": ([names[0]], [names[7]]), "mot": (names[1:7], [names[0]])}
    results = load_results(plan)
    for run in results:
        for row, documents in zip(run.rows[2:], lost[run.arm], strict=False):
            row["data/unreadable_documents"] = documents
    prints = compare_fingerprints(results)
    assert prints.unreadable == {"dense_seed1": (names[0], names[7]), "mot_seed1": (*names[1:7], names[0])}
    assert prints.broken[0].endswith(
        f"mot alone could not read 6 documents ({', '.join(names[1:6])} and 1 more), "
        f"dense alone could not read 1 documents ({names[7]})"
    )


def test_other_held_out_data_is_found_out(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan)
    results = load_results(plan)
    for run in results:
        run.rows[-1]["data/heldout_fingerprint"] = "aa"
    assert compare_fingerprints(results).proven
    results[-1].rows[-3]["data/heldout_fingerprint"] = "bb"  # of an attempt before
    prints = compare_fingerprints(results)
    assert not prints.proven
    assert prints.broken == (
        "they were evaluated on different held-out data: dense_seed1, mot_seed1, dense_seed2, mot_seed2 "
        "on aa; mot_seed2 on bb",
    )


def test_without_a_common_step_nothing_is_proven(synthetic_plan: MakePlan, write_runs: Write) -> None:
    plan = synthetic_plan(seeds=(1,))
    write_runs(plan, until=lambda arm, seed: 0 if arm == "mot" else None)
    assert not compare_fingerprints(load_results(plan)).proven
    results: Any = ()
    assert not compare_fingerprints(results).proven


def test_curves_are_aligned_at_the_steps_that_all_have(synthetic_plan: MakePlan, write_runs: Write) -> None:
    """A window without a target of a modality has no training loss of it, and seeds differ in which."""
    plan = synthetic_plan(seeds=(1, 2))
    write_runs(plan)
    one, _, two, _ = load_results(plan)
    del one.rows[3]["train/loss/speech"], two.rows[5]["train/loss/speech"]
    curves = aligned([run.curve("train/loss/speech") for run in (one, two)])
    assert curves[0].steps.tolist() == curves[1].steps.tolist()
    assert len(curves[0]) == 58 and not {40, 60} & set(curves[0].steps)
