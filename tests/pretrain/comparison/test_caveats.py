"""Each caveat appears when it must, and a clean comparison has none but those of its size."""

from collections.abc import Callable

import pytest

from pretrain.comparison.caveats import caveats
from pretrain.comparison.findings import find
from pretrain.comparison.plan import ComparisonPlan
from pretrain.comparison.results import load_results

MakePlan = Callable[..., ComparisonPlan]
Write = Callable[..., None]


@pytest.fixture
def texts(synthetic_plan: MakePlan, write_runs: Write) -> Callable[..., tuple[str, str]]:
    """(grave, other) caveats of a comparison, each as one text."""

    def make(
        seeds: tuple[int, ...] = (1, 2, 3), edit: Callable[[str], str] = lambda text: text, **how: object
    ) -> tuple[str, str]:
        plan = synthetic_plan(seeds=seeds, edit=edit)
        write_runs(plan, **how)
        found = caveats(find(plan, load_results(plan)))
        return tuple("\n".join(c.text for c in found if c.grave is grave) for grave in (True, False))  # type: ignore[return-value]

    return make


def better(arm: str, _: str) -> float:
    return 1.5 if arm == "mot" else 1.0


def test_a_clean_comparison_has_only_what_its_size_brings(texts: Callable[..., tuple[str, str]]) -> None:
    grave, other = texts(seeds=(1, 2, 3, 4, 5), multiplier=better)
    assert grave == ""
    assert [line.split(":")[0] for line in other.splitlines()] == [
        "Intervals hold what another seed would change, over one fixed set of held-out documents. Other "
        "documents would change the losses too.",
        "Step matching reads the faster arm in the middle of its learning-rate schedule and the slower one "
        "at its end",
    ]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({"seeds": (1,)}, "One seed"),
        ({"seeds": (1, 2)}, "2 seeds: there is no interval"),
        ({"until": lambda arm, seed: 300}, "cut at step 300 of 600"),
        (
            {"until": lambda arm, seed: 300 if (arm, seed) == ("mot", 2) else None},
            "Not finished yet: mot_seed2",
        ),
        ({"commit": lambda arm: arm}, "made by 2 versions of the code"),
        ({"device": lambda arm: arm}, "differ in device or layout"),
        ({"arithmetic": lambda arm: arm}, "computed by 2 kinds of processor or arithmetic path"),
        ({"fingerprint_salt": lambda arm: arm}, "did not read the same data: seed 1: mot and dense"),
        (
            {"flops_per_token": lambda arm: 3.3e6 if arm == "mot" else 3e6},
            "mot spent 1.100 times the training FLOPs",
        ),
        (
            {"shift": lambda arm, m, frac: 0.9 - frac if arm == "mot" else 0.0},
            "On image the curve of mot crossed late",
        ),
    ],
)
def test_grave_ones(texts: Callable[..., tuple[str, str]], how: dict, expected: str) -> None:
    grave, _ = texts(**{"multiplier": better if "shift" not in how else lambda *_: 1.0, **how})
    assert expected in grave


def test_metrics_without_a_digest_are_named(texts: Callable[..., tuple[str, str]]) -> None:
    _, other = texts(until=lambda arm, seed: 300 if arm == "mot" else None)
    unproven = "That the metrics of mot_seed1, mot_seed2 and mot_seed3 are as they were written is not proven"
    assert unproven in other


def test_an_attempt_that_never_had_a_device_says_nothing_of_devices(
    texts: Callable[..., tuple[str, str]],
) -> None:
    grave, _ = texts(multiplier=better, device=lambda arm: "cpu" if arm == "dense" else None)
    assert "device" not in grave


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ({}, "3 seeds: intervals are wide"),
        (
            {"edit": lambda t: t.replace("tuning =", "#")},
            "All arms use one learning rate, and the comparison does not",
        ),
        (
            {"lost_steps": lambda arm: 6 * (arm == "mot")},
            "(on_spike) cost mot_seed1 6 steps, mot_seed2 6 steps",
        ),
        (
            {"multiplier": lambda arm, _: 0.7 if arm == "mot" else 1.0},
            "Not all losses that dense had were reached by mot on text, image and speech.",
        ),
        ({"shift": lambda arm, _, f: 2 * max(0.0, f - 0.5)}, "has risen since: it overfits"),
        (
            {"shift": lambda arm, _, f: 0.4 * f - 0.5 if arm == "mot" else 0.0},
            "The gap of mot on text, image and speech was closing at the end",
        ),
    ],
)
def test_others(texts: Callable[..., tuple[str, str]], how: dict, expected: str) -> None:
    _, other = texts(**{"multiplier": better if "shift" not in how else lambda *_: 1.0, **how})
    assert expected in other


@pytest.mark.parametrize(
    ("experts", "coupled"),
    [
        ("{num_experts = 4}", True),
        ("{num_experts = 4, capacity_factor = 4}", False),  # each expert takes every token
        ('{num_experts = 4, routing = "token_choice", top_k = 2}', False),
    ],
)
def test_expert_choice_couples_documents(
    texts: Callable[..., tuple[str, str]], experts: str, coupled: bool
) -> None:
    def edit(text: str) -> str:
        text = text.replace('vary = ["model.towers"]', 'vary = ["model.towers", "model.experts"]')
        return text.replace("[arms.mot]", f"[arms.mot.model]\nexperts.text = {experts}")

    _, other = texts(edit=edit)
    assert ("Expert choice in mot: documents that are packed into one sequence compete" in other) == coupled


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("", ""),
        ("model.vectors.image.shift = 3.0", "mot and dense measure the loss on image differently"),
        ("loss_weights.image = 5.0", "The arms weigh image differently (loss_weights)"),
    ],
)
def test_losses_of_images_as_vectors_are_no_nats_and_may_differ_in_kind(
    texts: Callable[..., tuple[str, str]], change: str, expected: str
) -> None:
    def edit(text: str) -> str:
        text = text.replace('"model.towers"]', '"model.towers", "model.vectors", "loss_weights"]')
        text = text.replace("[arms.mot]", f"[arms.mot]\n{change}")
        return text + "\n[common.model.vectors.image]\nfeatures = 12\n"

    grave, other = texts(edit=edit, multiplier=better)
    assert "The loss on image is the mean squared error per number" in other
    assert grave.startswith(expected) and bool(grave) == bool(expected)
