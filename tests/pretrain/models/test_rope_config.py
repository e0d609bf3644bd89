"""Keys of scaled RoPE that belong together, and what is refused."""

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.models.rope_config import RopeScalingConfig

LLAMA3 = {
    "kind": "llama3", "factor": 8.0, "original_context_tokens": 8192, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 32768}
REFUSED = {
    "an unknown kind": (YARN | {"kind": "ntk"}, "kind.*linear"),
    "no factor": ({"kind": "linear"}, "factor: required"),
    "a smaller context": (YARN | {"factor": 0.5}, "factor = 0.5"),
    "what llama3 needs": (
        {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
        '"llama3" needs original_context_tokens, high_freq_factor; set them',
    ),
    "a key of another kind": (
        LLAMA3 | {"beta_fast": 32.0},
        '"llama3" has no beta_fast; legal: kind, factor, original_context_tokens, low',
    ),
    "a key that linear ignores": ({"kind": "linear", "factor": 2.0, "original_context_tokens": 9}, "has no"),
    "waves the wrong way round": (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor = 4.0 must be less"),
    "turns the wrong way round": (YARN | {"beta_fast": 0.5}, "beta_fast = 0.5 must not be less .*beta_slow"),
    "half of a pair": (YARN | {"mscale": 1.0}, "set both, or neither"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_belong_together_is_refused(case: str) -> None:
    values, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected):
        validate(RopeScalingConfig, values, source="run.toml")


def test_only_yarn_scales_queries_and_keys() -> None:
    def magnitude(**values: object) -> float:
        return RopeScalingConfig.model_validate(values).magnitude

    assert magnitude(**LLAMA3) == magnitude(kind="linear", factor=3.0) == 1.0
    assert magnitude(**YARN) == pytest.approx(1.138629436111989, abs=1e-15)  # 0.1 ln(4) + 1
    assert magnitude(**YARN, attention_factor=0.7) == 0.7
    assert magnitude(**YARN, mscale=0.5, mscale_all_dim=0.5) == 1.0
