"""What Llama's and Qwen's layouts say is understood or refused; see numerics/test_imported_logits.py."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from data_pipeline.files.toml_config import ConfigError
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import logical_shapes
from pretrain.weights.folder import INDEX, MODEL, WeightSource, about_model, open_weights, write_folder
from pretrain.weights.hugging_face import (
    CONFIG,
    config_of,
    open_hugging_face,
    parts,
    read_model,
    to_hugging_face,
)
from tests.pretrain.models.random_batch import MOT, TWO_TOWERS, tiny_config
from tests.pretrain.tiny_hugging_face import models, tiny_hugging_face

# As released: Llama 3 8B, Qwen2.5 and Qwen3 of 0.5 and 0.6 B, the fields that are read.
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 128256,
}  # fmt: skip
QWEN_2_5 = {
    "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896,
    "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
    "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN_3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
    "model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip


def test_released_configs_are_understood() -> None:
    llama, qwen = (read_model(Path(CONFIG), config) for config in (LLAMA_3, QWEN_3))
    assert (llama.head_dim, llama.kv_heads, llama.ffn_width) == (128, 8, 14336)
    assert (llama.rope_theta, llama.norm_eps, llama.qk_norm) == (500_000.0, 1e-5, False)
    assert llama.head_size is None and llama.norm_placement == qwen.norm_placement == "pre"
    assert (qwen.head_dim, qwen.num_heads, qwen.d_model, qwen.qk_norm) == (128, 16, 1024, True)
    assert not llama.qkv_bias and not qwen.qkv_bias and llama.rope_scaling is None
    biased = read_model(Path(CONFIG), QWEN_2_5)
    assert (biased.head_dim, biased.qkv_bias, biased.qk_norm, biased.tied_embeddings) == (
        64,
        True,
        False,
        True,
    )


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a mixture of experts": ({"model_type": "qwen3_moe"}, r'"qwen3_moe" cannot.*legal: llama, qwen2, qwen3'),
    "no model at all": ({"model_type": None}, "model_type"),
    "biases": ({"attention_bias": True}, "attention_bias = True cannot .*output projection has no bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act = gelu.*legal: silu"),
    "quantised": (
        {"quantization_config": {"quant_method": "gptq"}},
        "quantization_config.*fetch the original",
    ),
    "a sliding window": ({"use_sliding_window": True}, "use_sliding_window"),
    "a field is missing": ({"rms_norm_eps": None}, "rms_norm_eps: required, but missing"),
    "an impossible shape": ({"num_key_value_heads": 5}, "num_kv_heads = 5"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_computed_is_refused(case: str) -> None:
    changes, expected = REFUSED[case]
    with pytest.raises(ConfigError, match=expected) as error:
        read_model(Path("llama/config.json"), LLAMA_3 | changes)
    assert str(error.value).startswith("llama/config.json: ")


@models
def test_parts_are_the_tensors_of_transformers(tmp_path: Path, kind: str) -> None:
    reference = tiny_hugging_face(kind, tmp_path)
    source = open_hugging_face(tmp_path)
    theirs = {part.name: part.shape for each in parts(source.model).values() for part in each}
    held = {name: tuple(tensor.shape) for name, tensor in reference.named_parameters()}
    assert theirs == held  # where embedding and head are one, it is there once
    assert list(source.tensors) == list(logical_shapes(source.model))
    assert {name: t.shape for name, t in source.tensors.items()} == logical_shapes(source.model)
    assert {name: t.read().shape for name, t in source.tensors.items()} == logical_shapes(source.model)


def test_tied_embeddings_are_one_weight(tmp_path: Path) -> None:
    """Also where a file holds it twice."""
    reference = tiny_hugging_face("llama_tied", tmp_path, file_size="1GB")
    assert open_hugging_face(tmp_path).model.tied_embeddings
    twice = {name: tensor.clone() for name, tensor in reference.state_dict().items()}
    save_file(twice, tmp_path / "model.safetensors")
    source = open_hugging_face(tmp_path)
    assert "lm_head.weight" in twice and "head.weight.shared" not in source.tensors
    theirs, config = to_hugging_face(source)
    assert config["tie_word_embeddings"] is True and "lm_head.weight" not in theirs.tensors


def test_a_tied_head_that_is_scaled_is_written_by_itself(tmp_path: Path) -> None:
    tiny_hugging_face("llama_tied", tmp_path)
    source = open_hugging_face(tmp_path)
    source = replace(source, model=source.model.model_copy(update={"mup_base_width": 8}))
    theirs, config = to_hugging_face(source)
    head, embedding = (theirs.tensors[f"{name}.weight"].read() for name in ("lm_head", "model.embed_tokens"))
    assert config["tie_word_embeddings"] is False and torch.equal(head, embedding / 2)


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "more layers than tensors": (
        lambda f: edit_config(f, num_hidden_layers=3),
        r"tensors of a llama model .*missing: model\.layers\.2\.\S+, .* and 5 more",
    ),
    "layers that the config does not know": (
        lambda f: edit_config(f, num_hidden_layers=1),
        r"not part of it: model\.layers\.1\.",
    ),
    "another width": (
        lambda f: edit_config(f, intermediate_size=20),
        r"mlp\.gate_proj\.weight \[24, 16\] instead of \[20, 16\]",
    ),
    "tied, but said not to be": (lambda f: edit_config(f, tie_word_embeddings=False), "missing: lm_head"),
    "no config": (lambda f: (f / CONFIG).unlink(), "config.json: no such file"),
    "config is no JSON": (lambda f: (f / CONFIG).write_text("<html>"), "config.json: not valid JSON"),
    "config is no table": (
        lambda f: (f / CONFIG).write_text("[1]"),
        "config.json: holds a list, not a table",
    ),
    "a kind that is no word": (lambda f: edit_config(f, model_type=["llama"]), "model_type = .* cannot"),
    "scaling by a word": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling="linear"),
        "rope_scaling = linear cannot",
    ),
    "a file was not fetched": (
        lambda f: (f / "model-00002-of-00006.safetensors").unlink(),
        "model-00002-of-00006.safetensors: missing, .*fetch",
    ),
    "only some files, no index": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_files_that_do_not_fit_are_told(tmp_path: Path, case: str) -> None:
    edit, expected = MISFITS[case]
    tiny_hugging_face("llama_tied", tmp_path)
    edit(tmp_path)
    with pytest.raises(ConfigError, match=expected):
        open_hugging_face(tmp_path)


@pytest.mark.parametrize(
    ("towers", "changes", "expected"),
    [
        (MOT, {"norm_placement": "pre"}, r"untied = \[.*\] over towers text, image, speech"),
        (MOT, {"norm_placement": "pre", "untied": ["norm"]}, r"untied = \['norm'\]"),
        (
            {"text": "text"},
            {"norm_placement": "pre", "experts": {"text": {"num_experts": 2}}},
            "experts of text: they have one feed-forward",
        ),
        (
            {"text": "text"},
            {
                "norm_placement": "pre",
                "depth": {"text": {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}},
            },
            "depth of text: every token runs in all of their layers",
        ),
        ({"text": "text"}, {"norm_placement": "post"}, 'norm_placement = "post": their norms stand before'),
        ({"text": "text"}, {"norm_placement": "pre", "norm": "layer"}, 'norm = "layer".* norms are RMSNorm'),
        ({"text": "text"}, {"norm_placement": "pre", "qk_norm": "layer"}, "qk_norm = layer: their norms are"),
        (
            {"text": "text"},
            {"norm_placement": "pre", "qk_norm_eps": 0.1},
            "qk_norm_eps = 0.1: their norms sh",
        ),
        (
            {"text": "text"},
            {"norm_placement": "pre", "qkv_bias": True},
            "Qwen2 has the biases, Qwen3 the norms",
        ),
    ],
)
def test_what_their_layout_cannot_hold_is_refused(towers: dict, changes: dict, expected: str) -> None:
    source = WeightSource(Path("runs/a"), tiny_config(towers, **changes), {}, "a")
    with pytest.raises(ConfigError, match=expected) as error:
        to_hugging_face(source)
    assert str(error.value).startswith("runs/a cannot be expressed") and "--format motley" in str(error.value)


def test_towers_that_share_all_weights_are_one_model() -> None:
    config = tiny_config(TWO_TOWERS, untied=[], norm_placement="pre", qk_norm=False)
    assert {name.rpartition(".")[2] for name in parts(config)} == {"shared"}


@pytest.mark.parametrize("qk_norm", [True, False])
def test_config_is_read_back(qk_norm: bool) -> None:
    config: ModelConfig = tiny_config(
        {"text": "text"},
        norm_placement="pre",
        qk_norm=qk_norm,
        rope_theta=123.0,
        norm_eps=1e-3,
        head_size=6,
        tied_embeddings=qk_norm,
    )
    theirs = json.loads(json.dumps(config_of(config)))
    assert read_model(Path(CONFIG), theirs) == config.model_copy(update={"init_std": 0.02})
    if not qk_norm:
        assert LlamaConfig(**theirs).rope_parameters == {"rope_theta": 123.0, "rope_type": "default"}


def test_bf16_files_are_read_exactly(tmp_path: Path) -> None:
    """As most models are published; what is written is fp32 unless asked otherwise."""
    reference = tiny_hugging_face("llama", tmp_path / "fp32").bfloat16()
    reference.save_pretrained(tmp_path / "bf16")
    source = open_hugging_face(tmp_path / "bf16")
    write_folder(tmp_path / "out", source, {MODEL: about_model(source)}, dtype="fp32", file_bytes=10**9)
    value = open_weights(tmp_path / "out").tensors["blocks.1.feed_forward.gate_up.weight.text"].read()
    mlp = reference.model.layers[1].mlp
    assert value.dtype == torch.float32
    assert torch.equal(value, torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight)).float())
