"""Groups of a decoder's parameters, and schedules at exact steps."""

import pytest
from pydantic import ValidationError

from pretrain.config import OptimizerConfig, ScheduleConfig, TowerOptimizerConfig
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.train.optimizer import parameter_groups, schedule_factor
from tests.pretrain.models.random_batch import MOT, tiny_config

NUM_STEPS = 101


def _decoder() -> Decoder:
    towers = {"text": "text", "image": "image", "speech": "speech"}
    return Decoder(
        ModelConfig(
            num_layers=2,
            d_model=16,
            num_heads=2,
            context_tokens=8,
            vocab_tokens=32,
            ffn_hidden=16,
            towers=towers,
        )
    )


def test_every_parameter_is_in_one_group_and_norms_are_not_decayed() -> None:
    decoder = _decoder()
    groups = parameter_groups(
        decoder.named_parameters(), OptimizerConfig(learning_rate=1.0, weight_decay=0.3), decoder.config
    )
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert {group["tower"] for group in groups} == {"text", "image", "speech", "shared"}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name.endswith(f".{group['tower']}")
            # Vectors are norm weights, whole on every tensor-parallel rank.
            kind = "no_decay/whole" if parameter.ndim == 1 else "decay/cut"
            assert group["name"] == f"{group['tower']}/{kind}"
            assert (parameter.ndim == 1) == (group["weight_decay"] == 0)
        assert group["lr_scale"] == 1.0
        assert group["weight_decay"] in (0.0, 0.3)


def test_routers_of_experts_are_matrices_that_are_not_decayed() -> None:
    decoder = Decoder(tiny_config(MOT, experts={"image": {"num_experts": 4}}))
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.3)
    groups = {
        group["name"]: group for group in parameter_groups(decoder.named_parameters(), config, decoder.config)
    }
    group = groups["image/no_decay/whole"]
    held = {id(parameter) for parameter in group["params"]}
    routers = [parameter for name, parameter in decoder.named_parameters() if ".router." in name]
    assert routers and all(router.ndim == 2 and id(router) in held for router in routers)
    assert group["weight_decay"] == 0


def test_a_tower_has_its_own_factor_decay_and_freezing() -> None:
    decoder = _decoder()
    config = OptimizerConfig(
        learning_rate=1.0,
        towers={
            "image": TowerOptimizerConfig(lr_scale=0.25, weight_decay=0.0),
            "speech": TowerOptimizerConfig(frozen=True),
        },
    )
    groups = {
        group["name"]: group for group in parameter_groups(decoder.named_parameters(), config, decoder.config)
    }
    assert set(groups) == {
        f"{tower}/{kind}" for tower in ("text", "image") for kind in ("decay/cut", "no_decay/whole")
    } | {"shared/decay/cut"}
    assert groups["image/decay/cut"]["lr_scale"] == groups["image/no_decay/whole"]["lr_scale"] == 0.25
    assert groups["image/decay/cut"]["weight_decay"] == 0.0
    assert groups["text/decay/cut"]["weight_decay"] == config.weight_decay
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (not name.endswith(".speech")), name


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # No warm-up: the peak is step 0, the end is step 100, half-way is the mean of both.
        (ScheduleConfig(kind="cosine", min_factor=0.1), {0: 1.0, 50: 0.55, 100: 0.1}),
        # Warm-up of 11: (step + 1) / 11, at 1 with step 10; half-way down is step 55.
        (
            ScheduleConfig(kind="cosine", warmup_steps=11, min_factor=0.2),
            {0: 1 / 11, 4: 5 / 11, 10: 1.0, 55: 0.6, 100: 0.2},
        ),
        # 20 % of 101 steps is 20: step 80 is the last at 1, half-way down is step 90.
        (
            ScheduleConfig(kind="wsd", warmup_steps=2, min_factor=0.0, decay_frac=0.2),
            {0: 0.5, 1: 1.0, 80: 1.0, 90: 0.5, 99: 0.05, 100: 0.0},
        ),
        # Decay over all steps, warm-up included: never above either line.
        (
            ScheduleConfig(kind="wsd", warmup_steps=10, min_factor=0.0, decay_frac=1.0),
            {0: 0.1, 8: 0.9, 9: 91 / 101, 100: 0.0},
        ),
        # From 1 with step 10 to the last step, in equal differences; in equal ratios, half-way their mean.
        (
            ScheduleConfig(kind="linear", warmup_steps=11, min_factor=0.2),
            {4: 5 / 11, 10: 1.0, 55: 0.6, 73: 0.44, 100: 0.2},
        ),
        (
            ScheduleConfig(kind="exponential", warmup_steps=11, min_factor=0.01),
            {4: 5 / 11, 10: 1.0, 55: 0.1, 100: 0.01},
        ),
        (ScheduleConfig(kind="constant", warmup_steps=4), {0: 0.25, 3: 1.0, 100: 1.0}),
    ],
)
def test_schedule_at_exact_steps(schedule: ScheduleConfig, expected: dict[int, float]) -> None:
    for step, factor in expected.items():
        # abs: a cosine of pi is -1 to one rounding.
        assert schedule_factor(step, NUM_STEPS, schedule) == pytest.approx(factor, abs=1e-15), step


def test_an_exponential_decay_to_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="equal ratios never reach 0; set min_factor above 0"):
        ScheduleConfig(kind="exponential", min_factor=0.0)


@pytest.mark.parametrize("kind", ["cosine", "linear", "exponential", "wsd", "constant"])
@pytest.mark.parametrize(("num_steps", "warmup_steps"), [(1, 0), (2, 0), (2, 1), (7, 6), (50, 10)])
def test_schedules_rise_then_fall_within_their_bounds(kind: str, num_steps: int, warmup_steps: int) -> None:
    config = ScheduleConfig.model_validate({"kind": kind, "warmup_steps": warmup_steps, "min_factor": 0.05})
    factors = [schedule_factor(step, num_steps, config) for step in range(num_steps)]
    peak = max(warmup_steps - 1, 0)
    assert factors[peak] == max(factors) or kind == "wsd"
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if kind != "constant" and num_steps - 1 > peak:
        assert factors[-1] == pytest.approx(0.05, abs=1e-15)


def test_a_step_outside_the_run_is_a_bug() -> None:
    with pytest.raises(AssertionError):
        schedule_factor(NUM_STEPS, NUM_STEPS, ScheduleConfig())
