"""Which steps are spikes, and the books of what they lost."""

import math
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from parallel.engine import StepResult
from pretrain.config import RunConfig, SpikeConfig
from pretrain.metric_rows import step_sums
from pretrain.metrics import add
from pretrain.train.spikes import (
    SpikeError,
    check_allowed,
    leap,
    leap_of,
    lost,
    lost_row,
    objective,
    refusal,
    remember,
    taken_back,
)
from tests.pretrain.tiny_data import tiny_run

RULE = SpikeConfig(loss_factor=1.5, norm_factor=4.0, window=3)
USUAL = ((3.0, 1.0), (2.0, 0.5), (2.5, 8.0))
"""Medians 2.5 and 1.0."""


def _config(**changes: Any) -> RunConfig:
    return validate(RunConfig, tiny_run(Path("data"), Path("runs")) | changes, source="test")


@pytest.mark.parametrize(
    ("measured", "why"),
    [
        ((3.75, 4.0), None),  # a leap is more than the factor
        ((3.76, 4.0), "its loss of 3.76 is more than 1.5 times the median of the last 3 steps, 2.5"),
        ((1.0, 4.1), "its gradient norm of 4.1 is more than 4 times the median of the last 3 steps, 1"),
        ((math.nan, 1.0), "its loss or gradient is not finite"),
        ((2.0, math.inf), "its loss or gradient is not finite"),
    ],
)
def test_a_leap_is_measured_by_the_median(measured: tuple[float, float], why: str | None):
    assert leap(measured, USUAL, RULE) == why


def test_a_leap_needs_a_whole_window_and_a_factor():
    assert leap((9e9, 9e9), USUAL[1:], RULE) is None
    assert leap((9e9, 9e9), USUAL, SpikeConfig(window=3)) is None
    assert leap((9e9, 1.0), USUAL, SpikeConfig(norm_factor=4.0, window=3)) is None
    assert leap((math.nan, 1.0), (), SpikeConfig()) is not None


def test_the_loss_that_is_judged_is_the_objective():
    stats = [30.0, 8.0, 6.0, 10.0, 2.0, 1.0]  # nats, then targets, of text, image and speech
    assert objective(stats, _config()) == 44.0 / 13.0
    assert objective(stats, _config(loss_weights={"text": 0.0, "image": 0.5})) == 10.0 / 2.0
    assert math.isnan(objective([math.inf, *stats[1:]], _config()))


def test_a_step_that_is_refused_is_the_one_that_is_a_spike():
    config = _config(on_spike="skip", spike=RULE.model_dump())
    refuse = refusal(config, USUAL)
    assert refuse is not None
    for nats, norm in ((30.0, 1.0), (60.0, 1.0), (30.0, 5.0), (math.nan, 1.0)):
        stats = [nats, 0.0, 0.0, 12.0, 0.0, 0.0]
        result = StepResult(stats, 12.0, norm, {}, 1e-3)
        assert (
            refuse(stats, norm) == (leap_of(config, USUAL, result) is not None) == ((nats, norm) != (30, 1))
        )
    assert refusal(_config(), USUAL) is None


def test_only_the_window_is_remembered_and_only_where_a_leap_is_looked_for():
    result = StepResult([30.0, 0.0, 0.0, 12.0, 0.0, 0.0], 12.0, 0.25, {}, 1e-3)
    assert remember(_config(spike=RULE.model_dump()), USUAL, result) == (*USUAL[1:], (2.5, 0.25))
    assert remember(_config(on_spike="skip"), (), result) == ()


def test_what_ends_a_run_says_what_to_do():
    with pytest.raises(SpikeError, match=r'step 7 is a spike: so\. Nothing .* on_spike = "skip" leaves'):
        check_allowed(_config(), 7, 1, "so")
    check_allowed(_config(on_spike="rollback"), 7, 10, "so")
    with pytest.raises(
        SpikeError, match=r"step 7 is spike number 11 of the run: so\. spike\.max_spikes = 10"
    ):
        check_allowed(_config(on_spike="rollback"), 7, 11, "so")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"on_spike": "ignore"}, "on_spike"),
        ({"spike": {"loss_factor": 1.0}}, "spike.loss_factor"),
        ({"spike": {"window": 0}}, "spike.window"),
    ],
)
def test_a_rule_that_is_none_is_refused(changes: dict[str, Any], key: str):
    with pytest.raises(ConfigError, match=key):
        _config(**changes)


def _step(loss: float) -> dict[str, float]:
    return step_sums(
        targets={"text": (loss, 2.0)},
        tokens=256,
        flops=1e6,
        step_s=0.5,
        wait_s=0.25,
        fill_frac=0.75,
        grad_norm=1.0,
        grad_norm_by_tower={"text": 1.0},
    )


def test_what_is_useful_and_what_is_lost_are_what_was_spent():
    saved = add(add({}, _step(3.0)), lost(_step(math.nan)))
    assert lost_row(saved) == {
        "train/lost_steps": 1,
        "train/lost_tokens": 256,
        "compute/lost_flops": 1e6,
        "time/lost_s": 0.75,
    }
    assert (saved["loss/text"], saved["weight/text"], saved["flops"]) == (3.0, 2.0, 2e6)
    spent = add(add(add(saved, _step(2.0)), _step(1.0)), lost(_step(9.0)))
    back = taken_back(spent, saved)
    assert {name: back[name] for name in ("steps", "tokens", "flops", "step_s", "wait_s", "fill")} == {
        "steps": 5.0,
        "tokens": 5 * 256.0,
        "flops": 5e6,
        "step_s": 2.5,
        "wait_s": 1.25,
        "fill": 3.75,
    }
    assert lost_row(back) == {
        "train/lost_steps": 4,  # all but the first
        "train/lost_tokens": 4 * 256,
        "compute/lost_flops": 4e6,
        "time/lost_s": 3.0,
    }
    assert (back["loss/text"], back["weight/text"], back["grad_norm"]) == (3.0, 2.0, 1.0)
