"""Dense decoders in the layout of Hugging Face: Llama; Qwen3 if queries and keys are normalised; Qwen2 if
their projections have biases.

A Motley decoder is such a model if its norms stand before the sublayers (`norm_placement = "pre"`) and every
part has one weight shard. Three things differ (transformers 5.23, models/llama, qwen2 and qwen3). In Motley,
queries, keys and values are one tensor, and so are gate and up. Motley's RoPE rotates the pairs
(x[2i], x[2i + 1]) of a head, Hugging Face's the pairs (x[i], x[i + head_dim / 2]), so the rows of queries and
keys are in another order. Importing this module imports no torch.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data_pipeline.files.toml_config import ConfigError, load_toml, validate
from data_pipeline.shards.vocabulary import FIRST_IDS, SPECIAL_TOKENS
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import layers
from pretrain.weights.folder import LazyTensor, WeightSource, check_tensors, read_tensors
from pretrain.weights.hugging_face_rope import read_rope, rope_fields

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
_TOWER, _EMBEDDING, _HEAD = "text", "model.embed_tokens.weight", "lm_head.weight"
_HEAD_DIM = {"llama": None, "qwen2": None, "qwen3": 128}
"""By model_type, head_dim if config.json has none; None: hidden_size / num_attention_heads."""
_NAMES = {
    "num_layers": "num_hidden_layers", "d_model": "hidden_size", "num_heads": "num_attention_heads",
    "context_tokens": "max_position_embeddings", "vocab_tokens": "vocab_size", "norm_eps": "rms_norm_eps",
}  # fmt: skip
"""Motley's key -> the required field of config.json."""
_EXPRESSIBLE: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "feed-forwards are SwiGLU"),
    "attention_bias": (False, "attention's output projection has no bias"),
    "mlp_bias": (False, "feed-forwards have no biases"),
    "use_sliding_window": (False, "attention sees the whole document"),
    "quantization_config": (None, "weights must not be quantised; fetch the original model"),
}
"""By field of config.json: (the only value that a Motley model can have, the reason)."""


class TensorPart(NamedTuple):
    """A tensor of Hugging Face's, which holds some rows of a Motley tensor."""

    name: str
    shape: tuple[int, ...]
    rotary: bool = False
    """Whether RoPE rotates its rows, head by head."""


def parts(model: ModelConfig) -> dict[str, list[TensorPart]]:
    """By Motley tensor, the Hugging Face tensors whose rows it joins, for a model with one shard per part."""
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
    result = {}
    for layer in layers(model):
        (name,) = layer.names(model).values()
        stem, _, kind = layer.stem.rpartition(".")
        *block, stem = stem.split(".", 2)
        prefix, dims = f"model.layers.{block[1]}." if block else "", len(layer.shape)
        result[name] = [
            TensorPart(f"{prefix}{theirs}.{kind}", shape[:dims], *rest)
            for theirs, shape, *rest in table[stem]
        ]
    return result


def open_hugging_face(folder: Path) -> WeightSource:
    """Open a Llama, Qwen2 or Qwen3 folder (config.json and safetensors) as a dense model with Motley's names.

    Raises ConfigError, naming the field of config.json, for a model that Motley's decoder cannot compute.
    """
    fields = load_toml(folder / CONFIG)
    model = read_model(folder / CONFIG, fields)
    expected = parts(model)
    # Files of early Llama models also hold a table of RoPE's frequencies.
    tensors = {n: t for n, t in read_tensors(folder).items() if not n.endswith("rotary_emb.inv_freq")}
    if model.tied_embeddings:  # some files hold the embedding a second time
        tensors.pop(_HEAD, None)
    shapes = {part.name: part.shape for joined in expected.values() for part in joined}
    check_tensors(folder, tensors, shapes, f"a {fields['model_type']} model of its {CONFIG}")
    lazy = {}
    for name, joined in expected.items():
        rows = sum(part.shape[0] for part in joined)
        read = partial(_join, tensors, joined, model.head_dim)
        lazy[name] = LazyTensor((rows, *joined[0].shape[1:]), read)
    return WeightSource(folder, model, lazy, name=folder.resolve().name)


def read_model(path: Path, fields: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig, with one tower, of a config.json's content `fields`. Raises ConfigError."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in _HEAD_DIM:
        raise ConfigError(
            f'{path}: model_type = "{kind}" cannot be expressed; legal: {", ".join(_HEAD_DIM)} (others '
            "attend, normalise or choose experts in ways that no layer here does)"
        )
    for field, (legal, why) in _EXPRESSIBLE.items():
        if (value := fields.get(field)) not in (None, legal):
            raise ConfigError(f"{path}: {field} = {value} cannot be expressed: {why}; legal: {legal}")
    if absent := [field for field in (*_NAMES.values(), "intermediate_size") if fields.get(field) is None]:
        raise ConfigError(f"{path}: {', '.join(absent)}: required, but missing; fetch the file again")
    theta, scaling = read_rope(path, fields)
    values = {key: fields[name] for key, name in _NAMES.items()} | {
        "num_kv_heads": fields.get("num_key_value_heads"),
        "head_size": fields.get("head_dim") or _HEAD_DIM[kind],
        "ffn_hidden": fields["intermediate_size"],
        "towers": {_TOWER: _TOWER},
        "norm_placement": "pre",
        "qk_norm": kind == "qwen3",
        "qkv_bias": kind == "qwen2",
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tied_embeddings": bool(fields.get("tie_word_embeddings")),
    }
    return validate(ModelConfig, values, source=str(path))


def to_hugging_face(source: WeightSource) -> tuple[WeightSource, dict[str, Any]]:
    """(weights with Hugging Face's names, config.json). Raises ConfigError for a model of another kind."""
    model, theirs = source.model, {}
    if why := _inexpressible(model):
        raise ConfigError(
            f"{source.path} cannot be expressed as Llama, Qwen2 or Qwen3 ({why}); use --format motley"
        )
    for name, joined in parts(model).items():
        for number, part in enumerate(joined):
            read = partial(_cut, source.tensors[name], joined, number, model.head_dim)
            theirs[part.name] = LazyTensor(part.shape, read)
    if model.width_ratio != 1:  # transformers divides no logits, so the head is divided
        head = theirs.get(_HEAD, theirs[_EMBEDDING])
        theirs[_HEAD] = LazyTensor(head.shape, lambda: head.read() / model.width_ratio)
    return replace(source, tensors=theirs), config_of(model, source.special_tokens)


def _inexpressible(model: ModelConfig) -> str | None:
    """What a model has that no layout of Hugging Face's has a place for; None: there is one for all of it."""
    split = list(model.untied) if len(model.tower_names) > 1 else []
    if model.vectors:
        return f"model.vectors of {', '.join(model.vectors)}: they take ids alone"
    if model.depth:
        return f"model.depth of {', '.join(model.depth)}: every token runs in all of their layers"
    if model.experts:
        return f"model.experts of {', '.join(model.experts)}: they have one feed-forward"
    if split:
        towers = ", ".join(model.tower_names)
        return f"model.untied = {split} over towers {towers}: they have one set of weights"
    if model.norm_placement != "pre":
        return f'model.norm_placement = "{model.norm_placement}": their norms stand before the sublayers'
    if model.norm != "rms" or model.query_key_norm not in (None, "rms"):
        return f'model.norm = "{model.norm}" and model.qk_norm = {model.qk_norm}: their norms are RMSNorm'
    if model.query_key_norm and model.query_key_eps != model.norm_eps:
        return f"model.qk_norm_eps = {model.qk_norm_eps}: their norms share norm_eps = {model.norm_eps}"
    if model.query_key_norm and model.qkv_bias:
        return "model.qkv_bias beside model.qk_norm: Qwen2 has the biases, Qwen3 the norms"
    return None


def config_of(model: ModelConfig, special_tokens: Mapping[str, int] | None = None) -> dict[str, Any]:
    """The content of config.json, in a form that transformers 4 and 5 read. `special_tokens`: their ids;
    None: the first ids."""
    ids = special_tokens or dict(zip(SPECIAL_TOKENS, FIRST_IDS, strict=True))
    kind = "qwen3" if model.query_key_norm else "qwen2" if model.qkv_bias else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        **{theirs: getattr(model, ours) for ours, theirs in _NAMES.items()},
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_width,
        "rope_theta": model.rope_theta,
        "rope_scaling": rope_fields(model.rope_scaling),
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied_embeddings and model.width_ratio == 1,
        **{field: legal for field, (legal, _) in _EXPRESSIBLE.items() if legal is not None},
        **{f"{name}_token_id": ids[f"<{name}>"] for name in ("pad", "bos", "eos")},
    }


def _join(theirs: Mapping[str, LazyTensor], joined: list[TensorPart], head_dim: int) -> "Tensor":
    """A Motley tensor from its parts, with the rows of rotary parts in Motley's order."""
    import torch

    read = ((theirs[part.name].read(), part.rotary) for part in joined)
    pairs = (2, head_dim // 2)
    return torch.cat(
        [t.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2) if r else t for t, r in read]
    )


def _cut(ours: LazyTensor, joined: list[TensorPart], number: int, head_dim: int) -> "Tensor":
    """The part `number` of a Motley tensor: the inverse of `_join`."""
    rows = ours.read().split([part.shape[0] for part in joined])[number]
    pairs = (head_dim // 2, 2)
    return rows.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2) if joined[number].rotary else rows
