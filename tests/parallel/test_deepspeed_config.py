"""The dictionary that DeepSpeed gets."""

import pytest

from parallel.deepspeed_config import deepspeed_config


def test_bf16_accumulates_and_reduces_in_fp32() -> None:
    config = deepspeed_config(
        zero_stage=2, precision="bf16", micro_batch_sequences=3, accumulation_steps=4, max_grad_norm=0.7
    )
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["data_types"]["grad_accum_dtype"] == config["communication_data_type"] == "fp32"
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.7
    assert config["zero_optimization"]["stage"] == 2


def test_the_engine_clips_at_stage_0() -> None:
    config = deepspeed_config(
        zero_stage=0, precision="fp32", micro_batch_sequences=1, accumulation_steps=1, max_grad_norm=0.7
    )
    assert config["gradient_clipping"] == 0.0
    assert "bf16" not in config


def test_what_deepspeed_would_get_wrong_is_refused() -> None:
    with pytest.raises(ValueError, match="stage 0 with bf16"):
        deepspeed_config(
            zero_stage=0, precision="bf16", micro_batch_sequences=1, accumulation_steps=1, max_grad_norm=1.0
        )
    with pytest.raises(ValueError, match="accumulation_steps = 0"):
        deepspeed_config(
            zero_stage=1, precision="fp32", micro_batch_sequences=1, accumulation_steps=0, max_grad_norm=1.0
        )
