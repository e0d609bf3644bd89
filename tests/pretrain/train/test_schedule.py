"""Schedules at exact steps, and where those of two configs part."""

from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig
from pretrain.optimizer_config import ScheduleConfig
from pretrain.train.schedule import first_difference, schedule_factor
from tests.pretrain.lineage.made_run import run_config

NUM_STEPS = 101


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


def test_a_schedule_that_starts_later_is_that_of_a_run_which_begins_there() -> None:
    whole = ScheduleConfig(kind="wsd", warmup_steps=3, decay_frac=0.3)
    later = whole.model_copy(update={"start_step": 40})
    assert [schedule_factor(40 + step, 90, later) for step in range(50)] == [
        schedule_factor(step, 50, whole) for step in range(50)
    ]
    with pytest.raises(ConfigError, match=r"step 40 comes before optimizer\.schedule\.start_step = 40"):
        schedule_factor(39, 90, later)


def config_of(steps: int, kind: str, **depth: Any) -> RunConfig:
    depths = {"image": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"} | depth} if depth else {}
    return run_config("runs", steps=steps, schedule={"kind": kind, "warmup_steps": 4}, depth=depths)


@pytest.mark.parametrize(
    ("one", "other", "steps"),
    [
        (config_of(20, "constant"), config_of(30, "constant"), None),
        (config_of(20, "wsd"), config_of(30, "wsd"), 16),  # 4 of 20 steps decay
        (config_of(20, "constant"), config_of(22, "wsd"), 18),
        (config_of(20, "cosine"), config_of(30, "cosine"), 4),  # the warm-up is the same
        (config_of(20, "cosine"), config_of(20, "cosine"), None),
    ],
)
def test_schedules_part_where_their_factors_do(one: RunConfig, other: RunConfig, steps: int | None) -> None:
    found = first_difference(one, other, until=20)
    assert (None if found is None else found.steps) == steps
    assert found is None or found.key == "optimizer.schedule"


def test_ramps_of_depth_routing_part_too() -> None:
    """A fifth of 20 steps and a tenth of 40 are the same ramp; a fifth of 40 is longer."""
    short, same, longer = (
        config_of(steps, "constant", dense_frac=0.0, ramp_frac=frac)
        for steps, frac in ((20, 0.2), (40, 0.1), (40, 0.2))
    )
    assert first_difference(short, same, until=20) is None
    found = first_difference(short, longer, until=20)
    assert found is not None and (found.steps, found.key) == (1, "model.depth.image")
