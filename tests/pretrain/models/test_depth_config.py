"""Schedules of depth routing: p-MoD's table, means that are what was asked for, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.models.accounting import describe
from pretrain.models.config import MAX_LAYERS, ModelConfig
from pretrain.models.depth_config import DepthBlockConfig, DepthConfig, _ratios

SCHEDULES = ["constant", "alternating", "stepped", "linear", "cosine", "bathtub"]


def depth(**values: Any) -> DepthConfig:
    return DepthConfig.model_validate(
        {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"} | values
    )


def mean(ratios: tuple[float | None, ...]) -> float:
    return sum(1.0 if ratio is None else ratio for ratio in ratios) / len(ratios)


def test_cosine_is_the_table_of_p_mod() -> None:
    """research/pmod.md, from the released code: shiftedcos_decay_0.85_0.15, factor 0.5, 32 layers."""
    table = [
        0.844, 0.806, 0.764, 0.720, 0.674, 0.625, 0.576, 0.525,
        0.475, 0.424, 0.375, 0.326, 0.280, 0.236, 0.194, 0.156,
    ]  # fmt: skip
    ratios = depth(schedule="cosine", mean_ratio=0.5375, rule="top_k").ratios(32)
    assert ratios[:8] == (None,) * 8
    assert ratios[8:24] == pytest.approx(table, abs=6e-4)
    assert ratios[24:] == (0.15,) * 8
    # Its sum of trunc(576 R) over the layers is the published share of keys kept.
    kept = [576 if ratio is None else int(576 * ratio + 1e-9) for ratio in ratios]
    assert sum(kept) / (32 * 576) == pytest.approx(0.5369, abs=5e-5)


@given(
    st.sampled_from(SCHEDULES),
    st.floats(0.6, 1.0),
    st.integers(4, 40),
    st.sampled_from([0.05, 0.15]),
    st.sampled_from([0.85, 1.0]),
    st.integers(0, 1),
)
def test_the_mean_is_what_was_asked_for(
    schedule: str, wanted: float, layers: int, lowest: float, above: float, first: int
) -> None:
    config = depth(
        schedule=schedule, mean_ratio=wanted, min_ratio=lowest, dense_above=above, dense_first=first
    )
    try:
        ratios = config.ratios(layers)
    except ValueError as error:
        assert "cannot be had" in str(error)
        return
    assert mean(ratios) == pytest.approx(wanted, abs=1e-9)
    assert len(ratios) == layers and all(ratio is None for ratio in ratios[:first])
    assert all(ratio is None or lowest <= ratio <= 1 for ratio in ratios)


def test_shapes() -> None:
    assert depth().ratios(4) == (0.5,) * 4
    assert depth(schedule="alternating", mean_ratio=0.6).ratios(4) == (None, 0.2, None, 0.2)
    stepped = depth(schedule="stepped", steps=2, mean_ratio=0.7, dense_above=1.0, min_ratio=0.1).ratios(6)
    assert stepped == pytest.approx((1.0,) * 3 + (0.4,) * 3)
    bathtub = depth(schedule="bathtub", dense_first=2, dense_last=1, mean_ratio=0.7).ratios(9)
    assert bathtub[:2] == (None, None) and bathtub[-1] is None
    between = [1.0 if ratio is None else ratio for ratio in bathtub[2:-1]]
    assert between == between[::-1] and min(between) == between[2] == between[3]
    falling = [1.0 if r is None else r for r in depth(schedule="cosine").ratios(12)]
    assert falling == sorted(falling, reverse=True) and falling[0] == 1 and falling[-1] == 0.15


def test_ratio_1_can_be_routed() -> None:
    assert depth(mean_ratio=1.0, dense_above=1.0).ratios(3) == (1.0,) * 3
    assert depth(mean_ratio=1.0).ratios(3) == (None,) * 3


@pytest.mark.parametrize(
    ("values", "layers", "message"),
    [
        ({"schedule": "alternating"}, 4, r"means from 0.575 to 1; set mean_ratio"),
        ({"mean_ratio": 0.1}, 4, "means from 0.15 to 1"),
        ({"schedule": "bathtub", "dense_first": 3, "dense_last": 1}, 4, "leave none of num_layers = 4"),
    ],
)
def test_a_mean_that_cannot_be_had_is_refused(values: dict[str, Any], layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth(**values).ratios(layers)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero_init": True}, 'rule = "top_k"'),
        ({"dense_frac": 0.6, "ramp_frac": 0.6}, "more than the run"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        depth(**values)


def test_a_block_whose_attention_runs_for_all_tokens_has_the_keys_of_all() -> None:
    with pytest.raises(ValueError, match='set keys = "all"'):
        DepthBlockConfig(parts="feed_forward", keys="selected")


def test_keys_of_a_block_that_a_modalitys_table_had_are_told_where_they_are() -> None:
    values = {
        "num_layers": 2, "d_model": 8, "num_heads": 2, "context_tokens": 4, "vocab_tokens": 8,
        "towers": {"text": "all"}, "depth": {"text": depth().model_dump() | {"scale": "all"}},
    }  # fmt: skip
    with pytest.raises(ConfigError) as error:
        validate(ModelConfig, values, source="f.toml")
    assert str(error.value) == (
        'f.toml: depth.text.scale: this key has moved to "model.depth_block.scale"; '
        "its values mean what they meant"
    )


def test_warm_up() -> None:
    config = depth(dense_frac=0.1, ramp_frac=0.4)
    found = [config.ratio_at(0.2, progress) for progress in (0.0, 0.09, 0.1, 0.3, 0.5, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 1.0, 0.6, 0.2, 0.2])
    at_once = depth(dense_frac=0.0, ramp_frac=0.0)
    assert at_once.ratio_at(0.2, 0.0) == 0.2


def test_what_is_causal() -> None:
    assert depth().is_causal
    assert not depth(rule="top_k").is_causal
    assert not depth(gate="softmax").is_causal and not depth(gate="shifted_softmax").is_causal


def test_a_deep_model_is_described_from_one_pass_over_its_layers() -> None:
    _ratios.cache_clear()
    tables = {m: {"schedule": "cosine", "mean_ratio": 0.54, "rule": "top_k"} for m in ("text", "image")}
    sizes = {"d_model": 16, "num_heads": 2, "context_tokens": 12, "vocab_tokens": 40, "norm_placement": "pre"}
    values = {"num_layers": MAX_LAYERS, "towers": {m: m for m in tables}, "depth": tables, **sizes}
    assert f"{MAX_LAYERS} layers" in describe(ModelConfig.model_validate(values))
    assert _ratios.cache_info().misses == 1
