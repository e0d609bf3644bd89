"""Dense decoders in the layout of Hugging Face: Llama, or Qwen3 where queries and keys are normalised.

A decoder here is such a model if its norms stand before the sublayers (`norm_placement = "pre"`) and every
part has one weight shard. Three things differ (transformers 5.23, models/llama and models/qwen3): queries,
keys and values are one tensor here, gate and up are one; and RoPE turns the pairs (x[2i], x[2i + 1]) of a
head here, (x[i], x[i + head_dim / 2]) there, so the rows of queries and keys are in another order.
Importing this file imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.files.toml_config import ConfigError, load_toml, validate
from data_pipeline.shards.vocabulary import BOS, EOS, PAD
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import layers
from pretrain.weights.folder import LazyTensor, WeightSource, check_tensors, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_TOWER = "text"
_HEAD_DIM = {"llama": None, "qwen3": 128}
"""model_type -> head_dim where config.json names none; None: hidden_size / num_attention_heads."""
_NAMES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "context_tokens": "max_position_embeddings", "vocab_tokens": "vocab_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
"""Our name of a field of config.json that is always there."""
_EXPRESSIBLE: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "feed-forwards are SwiGLU"),
    "attention_bias": (False, "no layer has a bias"),
    "mlp_bias": (False, "no layer has a bias"),
    "use_sliding_window": (False, "attention sees the whole document"),
    "quantization_config": (None, "weights must not be quantised; fetch the original model"),
}
"""config.json's field -> (the only value that can be expressed, why)."""


class TensorPart(NamedTuple):
    """One of their tensors: some rows of one of ours."""

    name: str
    shape: tuple[int, ...]
    rotary: bool = False
    """Its rows are turned by RoPE, head by head."""


def parts(model: ModelConfig) -> dict[str, list[TensorPart]]:
    """Our tensor -> theirs, whose rows follow each other in it. For a model with one shard of every part."""
    d, width, head, vocab = model.d_model, model.ffn_width, model.head_dim, model.vocab_tokens
    q, k = model.num_heads * head, model.kv_heads * head
    table: dict[str, list[tuple[Any, ...]]] = {
        "embedding": [("model.embed_tokens", (vocab, d))],
        "attention.qkv": [
            *(("self_attn.q_proj", (q, d), True), ("self_attn.k_proj", (k, d), True)),
            ("self_attn.v_proj", (k, d)),
        ],
        "attention.qk": [("self_attn.q_norm", (head,), True), ("self_attn.k_norm", (head,), True)],
        "attention.out": [("self_attn.o_proj", (d, q))],
        "attention_norm": [("input_layernorm", (d,))],
        "feed_forward.gate_up": [("mlp.gate_proj", (width, d)), ("mlp.up_proj", (width, d))],
        "feed_forward.down": [("mlp.down_proj", (d, width))],
        "feed_forward_norm": [("post_attention_layernorm", (d,))],
        "final_norm": [("model.norm", (d,))],
        "head": [("lm_head", (vocab, d))],
    }  # fmt: skip
    found = {}
    for layer in layers(model):
        (name,) = layer.names(model).values()
        *block, stem = layer.stem.removesuffix(".weight").split(".", 2)
        at = f"model.layers.{block[1]}." if block else ""
        found[name] = [TensorPart(f"{at}{theirs}.weight", *rest) for theirs, *rest in table[stem]]
    return found


def open_hugging_face(folder: Path) -> WeightSource:
    """A Llama or Qwen3 folder (config.json and safetensors) under our names, as a dense model.

    Raises ConfigError, naming config.json's field, for what this decoder cannot compute.
    """
    theirs = load_toml(folder / CONFIG)
    model = read_model(folder / CONFIG, theirs)
    expected = parts(model)
    # Files of early Llama models also hold a table of RoPE's frequencies.
    held = {n: t for n, t in read_tensors(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if theirs.get("tie_word_embeddings") and "model.embed_tokens.weight" in held:
        held["lm_head.weight"] = held["model.embed_tokens.weight"]
    shapes = {part.name: part.shape for each in expected.values() for part in each}
    check_tensors(folder, held, shapes, f"a {theirs['model_type']} model of its {CONFIG}")
    ours = {}
    for name, each in expected.items():
        rows = sum(part.shape[0] for part in each)
        ours[name] = LazyTensor((rows, *each[0].shape[1:]), partial(_join, held, each, model.head_dim))
    return WeightSource(folder, model, ours, name=folder.resolve().name)


def read_model(path: Path, theirs: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of what a config.json describes, with one tower. Raises ConfigError."""
    kind = theirs.get("model_type")
    if not isinstance(kind, str) or kind not in _HEAD_DIM:
        raise ConfigError(
            f'{path}: model_type = "{kind}" cannot be expressed; legal: {", ".join(_HEAD_DIM)} (Qwen 2 and '
            "2.5 add biases, others attend, normalise or choose experts in ways that no layer here does)"
        )
    for field, (legal, why) in _EXPRESSIBLE.items():
        if (value := theirs.get(field)) not in (None, legal):
            raise ConfigError(f"{path}: {field} = {value} cannot be expressed: {why}; legal: {legal}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # the latter before version 5
    scaling = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
    if scaling != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"{path}: rope_scaling = {rope} cannot be expressed: RoPE turns all pairs by unscaled angles; "
            "import a model without scaling, such as the one that this one was extended from"
        )
    if absent := [field for field in (*_NAMES.values(), "intermediate_size") if theirs.get(field) is None]:
        raise ConfigError(f"{path}: {', '.join(absent)}: required, but missing; fetch the file again")
    values = {ours: theirs[name] for ours, name in _NAMES.items()} | {
        "num_kv_heads": theirs.get("num_key_value_heads"),
        "head_size": theirs.get("head_dim") or _HEAD_DIM[kind],
        "ffn_hidden": theirs["intermediate_size"],
        "towers": {_TOWER: _TOWER},
        "norm_placement": "pre",
        "qk_norm": kind == "qwen3",
        "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
    }
    return validate(ModelConfig, values, source=str(path))


def to_hugging_face(source: WeightSource) -> tuple[WeightSource, dict[str, Any]]:
    """The same weights under their names, and config.json. Raises ConfigError for what has no place there."""
    model, theirs = source.model, {}
    split = [part for part in ("attention", "feed_forward", "norm") if len(model.shards_of(part)) > 1]
    if split or model.experts or model.depth or model.norm_placement != "pre":
        why = (
            f"model.depth of {', '.join(model.depth)}: every token runs in all of their layers"
            if model.depth
            else f"model.experts of {', '.join(model.experts)}: they have one feed-forward"
            if model.experts
            else f"model.untied = {split} over towers {', '.join(model.tower_names)}: they have one set of "
            "weights"
            if split
            else f'model.norm_placement = "{model.norm_placement}": their norms stand before the sublayers'
        )
        raise ConfigError(f"{source.path} cannot be expressed as Llama or Qwen3 ({why}); use --format motley")
    for name, each in parts(model).items():
        for number, part in enumerate(each):
            read = partial(_cut, source.tensors[name], each, number, model.head_dim)
            theirs[part.name] = LazyTensor(part.shape, read)
    return replace(source, tensors=theirs), config_of(model)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json, in the form that transformers 4 and 5 read."""
    kind = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(model, ours) for ours, theirs in _NAMES.items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_width,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        **{field: legal for field, (legal, _) in _EXPRESSIBLE.items() if legal is not None},
        **{"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS},
    }


def _join(theirs: Mapping[str, LazyTensor], each: list[TensorPart], head_dim: int) -> "Tensor":
    """Ours of their parts. A head's rows (x[i], x[i + head_dim / 2]) become (x[2i], x[2i + 1])."""
    import torch

    read = ((theirs[part.name].read(), part.rotary) for part in each)
    pairs = (2, head_dim // 2)
    return torch.cat(
        [t.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2) if r else t for t, r in read]
    )


def _cut(ours: LazyTensor, each: list[TensorPart], number: int, head_dim: int) -> "Tensor":
    """One of their parts of ours: the inverse of `_join`."""
    rows = ours.read().split([part.shape[0] for part in each])[number]
    pairs = (head_dim // 2, 2)
    return rows.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2) if each[number].rotary else rows
