"""Random Llama, Qwen2 and Qwen3 models of transformers, made from config objects: nothing is fetched."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 12,
    "initializer_range": 0.2, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "original_max_position_embeddings": 10,
    "low_freq_factor": 0.05, "high_freq_factor": 1.0,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 2000,
}  # fmt: skip
"""Both leave the first of two pairs as it is, and put the second between the ends of their ramps."""

MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama_tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama_all_heads": (LlamaConfig, LlamaForCausalLM, {"num_key_value_heads": 4}),
    "llama3.1": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "qwen2.5": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen2.5_yarn": (Qwen2Config, Qwen2ForCausalLM, {"rope_parameters": YARN}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 4}),
    "qwen3_wide_heads": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 6, "tie_word_embeddings": True}),
}
models = pytest.mark.parametrize("kind", MODELS)


def tiny_hugging_face(kind: str, folder: Path, *, file_size: str = "4KB", **changes: Any) -> PreTrainedModel:
    """A model, also saved into `folder`, in several files unless `file_size` is larger than it."""
    config, model, own = MODELS[kind]
    torch.manual_seed(0)
    made = model(config(**{**SHAPE, **own, **changes})).eval()
    with torch.no_grad():  # norms start as ones and biases as zeros: mistaken for others they would not show
        for name, parameter in made.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.uniform_(0.5, 1.5)
    made.save_pretrained(folder, max_shard_size=file_size)
    return made
