"""From a plan and final losses to effects with intervals."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from pretrain.comparison.effects import ENOUGH_RUNS, Effect, Run, design_of, detectable, effects
from pretrain.comparison.plan import ComparisonPlan
from tests.comparisons import effects_of

MakePlan = Callable[..., ComparisonPlan]
FAMILY = ("text", "image")
THIRD = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
BETWEEN = '[contrasts]\nbetween = ["mot", "pair"]\n'


@pytest.fixture
def plan(synthetic_plan: MakePlan) -> ComparisonPlan:
    """Three arms and five seeds; the contrast of two sparse arms is a verdict too."""
    return synthetic_plan(
        seeds=(1, 2, 3, 4, 5),
        edit=lambda text: 'primary = ["mot", "between"]\n' + text + THIRD + BETWEEN,
    )


def runs_of(plan: ComparisonPlan) -> list[Run]:
    return [(run.arm, run.seed) for run in plan.runs]


def losses(runs: list[Run], shift: dict[str, float], noise: float = 0.01) -> dict[str, list[float]]:
    generator = np.random.Generator(np.random.Philox(7))
    names = (*FAMILY, "all")
    return {
        m: [2.0 + shift.get(a, 0.0) + noise * generator.standard_normal() for a, _ in runs] for m in names
    }


def found(
    plan: ComparisonPlan, shift: dict[str, float], *, without: Sequence[Run] = (), interim: bool = False
) -> dict[tuple[str, str], Effect]:
    runs = [run for run in runs_of(plan) if run not in without]
    return effects(plan.config, runs, losses(runs, shift), family=FAMILY, interim=interim)


def test_every_contrast_has_an_effect_in_every_modality(plan: ComparisonPlan) -> None:
    out = found(plan, {"mot": -0.2, "pair": 0.1})
    assert {name for name, _ in out} == {"mot", "pair", "between"}
    text = out["mot", "text"]
    assert text.outcome == "lower" and text.estimate == pytest.approx(-0.2, abs=0.03)
    assert text.relative == pytest.approx(text.estimate / 2.0, rel=0.01) and text.margin == pytest.approx(
        0.01, rel=0.01
    )
    assert out["between", "image"].estimate == pytest.approx(-0.3, abs=0.03)


def test_primary_intervals_are_joint_and_others_hold_by_themselves(plan: ComparisonPlan) -> None:
    out = found(plan, {})
    primary = {key for key, effect in out.items() if effect.primary}
    assert primary == {(name, m) for name in ("mot", "between") for m in FAMILY}

    def width(key: tuple[str, str]) -> float:
        interval = out[key].interval
        assert interval is not None
        return interval.high - interval.low

    # all contrasts of one modality have one standard error in a complete design
    assert width(("mot", "text")) == pytest.approx(width(("between", "text")))
    assert width(("mot", "text")) > 1.3 * width(("pair", "text"))


def test_three_outcomes(plan: ComparisonPlan) -> None:
    assert found(plan, {"mot": 0.2})["mot", "text"].outcome == "higher"
    quiet = effects(plan.config, runs_of(plan), losses(runs_of(plan), {}, noise=0.001), family=FAMILY)
    assert quiet["mot", "text"].outcome == "equivalent" and quiet["mot", "text"].within_margin
    assert found(plan, {})["mot", "text"].outcome == "inconclusive"


def test_fewer_runs_than_enough_are_an_observation(plan: ComparisonPlan) -> None:
    lost = [("pair", seed) for seed in (1, 2, 3)]
    out = found(plan, {"pair": -5.0, "mot": -5.0}, without=lost)
    assert ENOUGH_RUNS == 3
    assert (out["pair", "text"].outcome, out["pair", "text"].interval) == ("observation", None)
    assert out["between", "text"].outcome == "observation"
    assert out["mot", "text"].outcome == "lower"  # it has all of its runs


def test_one_seed_is_a_difference_without_an_interval(synthetic_plan: MakePlan) -> None:
    out = found(synthetic_plan(seeds=(1,)), {"mot": -0.5})
    assert out["mot", "text"].outcome == "observation" and out["mot", "text"].estimate == pytest.approx(
        -0.5, abs=0.1
    )


def test_a_look_in_between_has_no_level(plan: ComparisonPlan) -> None:
    assert {effect.outcome for effect in found(plan, {"mot": -1.0}, interim=True).values()} == {"observation"}


def test_an_arm_whose_runs_all_diverged_leaves_the_fit_of_the_others_alone(plan: ComparisonPlan) -> None:
    runs = runs_of(plan)
    table = losses(runs, {"mot": -0.2})
    wild = {
        m: [9.0 + 3 * seed if arm == "pair" else v for (arm, seed), v in zip(runs, values, strict=True)]
        for m, values in table.items()
    }
    out = effects(plan.config, runs, wild, family=FAMILY, diverged=["pair"])
    assert out["pair", "text"].outcome == out["between", "text"].outcome == "observation"
    assert out["pair", "text"].estimate == pytest.approx(16, abs=0.1)
    few = [run for run in runs if run[0] != "pair"]
    alone = {m: [v for (arm, _), v in zip(runs, t, strict=True) if arm != "pair"] for m, t in table.items()}
    rest = plan.without(["pair"]).config
    assert rest.verdicts == ("mot",) and list(rest.differences) == ["mot"]
    assert out["mot", "text"] == effects(rest, few, alone, family=FAMILY)["mot", "text"]
    assert out["mot", "text"].outcome == "lower"


def test_an_interaction_is_a_difference_of_differences(synthetic_plan: MakePlan) -> None:
    fourth = THIRD.replace("pair", "both").replace("other", "rest") + '"model.untied" = ["attention"]\n'
    named = '[contrasts]\ncross = [["both", "pair"], ["mot", "dense"]]\n'

    def edit(text: str) -> str:
        text = text.replace('vary = ["model.towers"]', 'vary = ["model.towers", "model.untied"]')
        return text + THIRD + fourth.replace('"model.untied"', "untied") + named

    plan = synthetic_plan(edit=edit)
    design = design_of(plan.config, runs_of(plan), ["cross"])
    assert dict(zip(plan.config.arms, design.weights[0], strict=True)) == {
        "dense": 1, "mot": -1, "pair": -1, "both": 1,
    }  # fmt: skip
    out = found(plan, {"both": -1.0, "pair": -0.2, "mot": -0.1})
    assert out["cross", "text"].estimate == pytest.approx(-0.7, abs=0.05)
    assert not out["cross", "text"].primary


def test_more_seeds_of_the_baseline_see_smaller_differences(synthetic_plan: MakePlan) -> None:
    few, more = (
        detectable(synthetic_plan(edit=lambda text, extra=extra: f"extra_baseline_seeds = {extra}\n" + text))
        for extra in ([], [11, 12, 13])
    )
    assert few is not None and more is not None
    assert set(few) == {"text", "image", "speech"} and more["text"] < 0.9 * few["text"]


def test_detectable_differences_follow_the_deviations(synthetic_plan: MakePlan) -> None:
    plain = detectable(synthetic_plan())
    given = detectable(synthetic_plan(edit=lambda text: "pilot_deviation.text = 0.22\n" + text))
    assert plain is not None and given is not None
    assert given["text"] == pytest.approx(10 * plain["text"]) and given["image"] == plain["image"]
    assert detectable(synthetic_plan(seeds=(1, 2))) is None
    vectors = "\n[common.model.vectors.image]\nfeatures = 12\n"  # its loss is no nats
    assert set(detectable(synthetic_plan(edit=lambda text: text + vectors)) or {}) == {"text", "speech"}


def test_the_stars_of_a_committed_comparison_are_its_verdicts() -> None:
    """The table of docs/results/sparse_family.md has a row per arm, in the order of the file."""
    found = effects_of("sparse_family")
    text = Path("docs/results/sparse_family.md").read_text()
    table = text[text.index("| dense |") :].split("\n\n")[0].splitlines()[1:]
    starred = [["*" in cell for cell in row.strip("| ").split("|")[1:]] for row in table]
    contrasts = list(dict.fromkeys(contrast for contrast, _ in found))
    assert len(table) == len(contrasts) == 7
    assert starred == [
        [found[contrast, m].outcome in ("lower", "higher") for m in ("text", "image", "speech")]
        for contrast in contrasts
    ]
