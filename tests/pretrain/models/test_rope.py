"""Scaled frequencies are those of transformers' modeling_rope_utils."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from pretrain.models.query_key import rotary_table
from pretrain.models.rope_config import RopeScalingConfig
from pretrain.weights.hugging_face_rope import rope_fields

HEAD_DIM, THETA = 64, 500_000.0
CASES: dict[str, dict[str, Any]] = {
    "linear": {"kind": "linear", "factor": 2.5},
    "Llama 3.1": {
        "kind": "llama3", "factor": 8.0, "original_context_tokens": 8192, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "Qwen 2.5": {"kind": "yarn", "factor": 4.0, "original_context_tokens": 32768},
    "other turns": {
        "kind": "yarn", "factor": 40.0, "original_context_tokens": 4096, "beta_fast": 20.0, "beta_slow": 2.0,
    },
    "DeepSeek's": {
        "kind": "yarn", "factor": 40.0, "original_context_tokens": 4096, "mscale": 1.0, "mscale_all_dim": 0.7,
    },
    "a factor of its own": {
        "kind": "yarn", "factor": 2.0, "original_context_tokens": 4096, "attention_factor": 1.3,
    },
    "not truncated": {"kind": "yarn", "factor": 2.0, "original_context_tokens": 4096, "truncate": False},
    "a ramp of no length": {"kind": "yarn", "factor": 2.0, "original_context_tokens": 2},
}  # fmt: skip
FP32 = 2e-6
"""Relative. Both compute theta^-e in fp32, where one rounding of e is up to 6e-7 of the result."""


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_magnitude_are_those_of_transformers(case: str) -> None:
    scaling = RopeScalingConfig.model_validate(CASES[case])
    theirs = LlamaConfig(
        hidden_size=4 * HEAD_DIM, num_attention_heads=4, head_dim=HEAD_DIM, max_position_embeddings=131_072,
        rope_parameters={"rope_theta": THETA, **(rope_fields(scaling) or {})},
    )  # fmt: skip
    expected, magnitude = ROPE_INIT_FUNCTIONS[scaling.kind](theirs)
    for dtype in (torch.float32, torch.float64):
        # At position 1 the angle of a turn is its frequency; all are at most 1.
        table = rotary_table(torch.tensor([1]), HEAD_DIM, THETA, dtype, scaling)[0, 0]
        torch.testing.assert_close(table.angle().float(), expected, rtol=FP32, atol=0)
        torch.testing.assert_close(
            table.abs().double(), torch.full((HEAD_DIM // 2,), magnitude).double(), rtol=1e-6, atol=0
        )


def test_a_scaled_frequency_differs_from_the_plain_one() -> None:
    """Else the comparison with transformers would compare two times the same."""
    plain = rotary_table(torch.tensor([1]), HEAD_DIM, THETA)
    for values in CASES.values():
        scaling = RopeScalingConfig.model_validate(values)
        assert not torch.allclose(rotary_table(torch.tensor([1]), HEAD_DIM, THETA, scaling=scaling), plain)
