"""From logs to plan and results, and to findings."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.caveats import caveats
from pretrain.comparison.findings import Findings, find
from pretrain.comparison.foreign.csv_file import Measurement
from pretrain.comparison.foreign.logs import logs_of
from pretrain.comparison.foreign.plan import make_foreign_plan
from pretrain.comparison.verdict import headline, runs_text, verdict

ASKED = ("baseline=dense", "same_data=true")
LOSS = {"text": 3.0, "image": 1.5}


def measurements(**how: Any) -> list[Measurement]:
    """Losses of dense and mot, which needs half the tokens, over 3 seeds and 8 evaluations."""
    seeds, steps = how.get("seeds", {}), how.get("steps", {})
    generator = np.random.Generator(np.random.Philox(0))
    return [
        Measurement(
            f"runs.csv: {arm} {seed} {step} {modality}", arm, seed, step, 100.0 * step, modality,
            floor + 2 / (1 + step * (2 if arm == "mot" else 1) / 50) + 0.002 * generator.standard_normal(),
            None, None, None,
        )
        for arm in ("dense", "mot")
        for seed in seeds.get(arm, (1, 2, 3))
        for step in steps.get(arm, range(50, 401, 50))
        for modality, floor in LOSS.items()
    ]  # fmt: skip


def findings(lines: list[Measurement], *overrides: str) -> Findings:
    logs = logs_of(lines, "runs.csv")
    plan, results = make_foreign_plan([Path("runs.csv")], logs, None, [*ASKED, *overrides])
    return find(plan, results)


def texts(f: Findings) -> str:
    return "\n".join(caveat.text for caveat in caveats(f))


def test_foreign_runs_have_the_same_verdicts_as_our_own() -> None:
    f = findings(measurements())
    assert f.modalities == ("text", "image") and f.outcomes == f.modalities  # no loss over all targets
    assert f.axes == ("tokens", "steps") and f.tokens == 40_000
    contrast = f.contrast("mot", "text")
    assert contrast.winner == "mot" and contrast.final.interval is not None
    assert contrast.matching["tokens"].slope is not None
    assert contrast.matching["tokens"].slope.value == pytest.approx(0.5, abs=0.05)
    assert "mot is better than dense on text and image (2 verdicts, jointly at 95 %)" in headline(f, "mot")
    assert "of the tokens that dense took" in verdict(f, contrast).compute
    assert "stated (same_data) and not proven" in texts(f)


def test_without_a_statement_on_the_data_nothing_is_decided() -> None:
    f = findings(measurements(), "same_data=false")
    assert "nothing is decided between mot and dense" in headline(f, "mot")
    assert f.contrast("mot", "text").winner is None
    assert "same_data = true in the question file" in texts(f)


def test_arms_may_have_other_seeds_and_other_evaluation_points() -> None:
    lines = measurements(seeds={"mot": (4, 5, 6)}, steps={"mot": (30, 100, 170, 260, 400)})
    f = findings(lines)
    contrast = f.contrast("mot", "text")
    assert contrast.seeds == () and contrast.differences == () and len(contrast.gap) == 8
    assert contrast.winner == "mot" and len(contrast.matching["tokens"].matches) == 1
    assert "mot and dense have no seed in common" in texts(f)
    late = findings(measurements(steps={"mot": (220, 300, 400)})).contrast("mot", "text")
    assert late.gap_tokens.tolist() == [25_000, 30_000, 35_000, 40_000]  # where both are known
    with pytest.raises(ConfigError, match="from 5000 to 40000 tokens and mot from 50000 to 60000"):
        findings(measurements(steps={"mot": (500, 600)}))


def test_runs_that_end_early_or_not_finite_are_told_and_left_out() -> None:
    lines = [m for m in measurements() if not (m.arm == "mot" and m.seed == 2 and m.step == 400)]
    f = findings(lines)
    assert runs_text(f) == "5 of 6 runs finished" and len(f.runs("mot")) == 2
    logs = logs_of(lines, "runs.csv")
    key = ("mot", 2, None)
    training = {"step": 360, "tokens": 36_000, "train/loss": 1.0}
    for rows in ((*logs[key].rows, training), (training,)):
        trains = logs | {key: replace(logs[key], rows=rows)}
        asked = make_foreign_plan([Path("runs.csv")], trains, None, ASKED)
        assert runs_text(find(*asked)) == "5 of 6 runs finished"
    lines = [
        m._replace(loss=float("nan")) if (m.arm, m.seed, m.step) == ("mot", 2, 400) else m
        for m in measurements()
    ]
    f = findings(lines)
    assert runs_text(f) == "5 of 6 runs finished, mot_seed2 failed"
    assert "mot_seed2 failed: its loss (text) is nan at step 400" in texts(f)


def test_one_seed_is_an_observation() -> None:
    f = findings(measurements(seeds={"dense": (1,), "mot": (1,)}))
    assert "an observation, not a verdict" in headline(f, "mot")


def test_a_modality_that_some_runs_lack_is_left_out_and_said() -> None:
    lines = [m for m in measurements() if not (m.arm == "mot" and m.seed == 1 and m.modality == "image")]
    f = findings(lines)
    assert f.modalities == ("text",)
    assert "image is left out: seed 1 of mot has no loss on it." in texts(f)
    with pytest.raises(ConfigError, match="no modality is in all runs: text is not in seed 1 of mot"):
        findings([m for m in measurements() if (m.arm == "mot") == (m.modality == "image")])


def test_unequal_budgets_are_told() -> None:
    longer = [m._replace(tokens=1.5 * m.tokens) if m.arm == "mot" else m for m in measurements()]
    assert "mot had 1.500 times the tokens of dense" in texts(findings(longer))


@pytest.mark.parametrize(
    ("lines", "overrides", "message"),
    [
        (measurements()[:48], (), "holds one arm, dense"),
        (measurements(), ('arms=["dense", "moe"]',), 'arms: "moe" is in no log; arms there: dense, mot'),
        (measurements(), ("match=train_flops",), "seed 1 of dense has no flops"),
        (measurements(), ("size=5",), "size = 5: no run of dense has it; sizes: none"),
        (measurements()[:-1], (), "seed 3 of mot has a loss on image, but none at its last step, 400"),
        (
            [m._replace(size=float(m.seed)) for m in measurements()],
            (),
            "dense has runs of several sizes, and a comparison is of one; add size=..., which may be 1, 2, 3",
        ),
        ([m._replace(loss=float("nan")) for m in measurements()], (), "no run ends with a finite loss"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_sentence(
    lines: list[Measurement], overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        findings(lines, *overrides)


def test_a_size_is_chosen_and_a_baseline_must_be_named() -> None:
    lines = [m._replace(size=float(size), loss=m.loss + size) for size in (1, 2) for m in measurements()]
    f, alone = findings(lines, "size=2"), findings(measurements())
    assert f.plan.seeds == (1, 2, 3) and f.plan.sizes == {"dense": 2, "mot": 2}
    assert f.losses["mot", "text"].mean == pytest.approx(alone.losses["mot", "text"].mean + 2, abs=1e-12)
    with pytest.raises(ConfigError, match=r"required, but missing: .* baseline=dense; arms in the logs"):
        make_foreign_plan([Path("runs.csv")], logs_of(measurements(), "runs.csv"), None, [])
