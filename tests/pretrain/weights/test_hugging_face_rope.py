"""Scaled positions in config.json are understood, written or refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.weights.hugging_face import CONFIG, config_of, read_model
from tests.pretrain.weights.test_hugging_face import LLAMA_3, QWEN_2_5, QWEN_3

LLAMA_3_1 = LLAMA_3 | {
    "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
}  # fmt: skip
# The ways in which versions of transformers write it, and files hold a default or a null.
SCALED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama 3.1": (
        LLAMA_3_1,
        {
            "kind": "llama3", "factor": 8.0, "original_context_tokens": 8192, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    ),
    "Qwen 2.5 of long context": (
        QWEN_2_5
        | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
        {"kind": "yarn", "factor": 4.0, "original_context_tokens": 32768},
    ),
    "by version 5": (
        QWEN_3
        | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "beta_fast": None}},
        {"kind": "yarn", "factor": 4.0, "original_context_tokens": 40960},
    ),
    "linear": (
        LLAMA_3 | {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"kind": "linear", "factor": 2.0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scaled_positions_are_understood_and_written(case: str) -> None:
    fields, expected = SCALED[case]
    model = read_model(Path(CONFIG), fields)
    assert model.rope_scaling is not None and model.rope_theta == {"llama": 5e5}.get(
        fields["model_type"], 1e6
    )
    assert model.rope_scaling.model_dump(exclude_none=True) == expected
    back = read_model(Path(CONFIG), json.loads(json.dumps(config_of(model))))
    assert back == model.model_copy(update={"head_size": model.head_dim})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "positions of another kind": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}},
        "rope_scaling = .*dynamic.*of kind default, linear, llama3, yarn",
    ),
    "turned in part": ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "0.5"),
    "half of Llama 3.1": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}},
        'rope_scaling.*kind = "llama3" needs high_freq_factor',
    ),
    "version 5's name of it": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 5.0}}, "factor: req"),
    "a factor that is no number": ({"rope_scaling": {"type": "linear", "factor": "x"}}, "factor = .*x"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused(case: str) -> None:
    changes, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected) as error:
        read_model(Path("llama/config.json"), LLAMA_3 | changes)
    assert str(error.value).startswith("llama/config.json: ")
