"""Dense decoders in the layout of Hugging Face: Llama, or Qwen3 where queries and keys are normalised.

A decoder here is such a model if its norms stand before the sublayers (`norm_placement = "pre"`) and every
part has one weight shard. Three things differ (transformers 5.23, models/llama and models/qwen3): queries,
keys and values are one tensor here, gate and up are one; and RoPE turns the pairs (x[2i], x[2i + 1]) of a
head here, (x[i], x[i + head_dim / 2]) there, so the rows of queries and keys are in another order.
Importing this file imports no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_pipeline.toml_config import ConfigError, load_toml, validate
from data_pipeline.vocabulary import BOS, EOS, PAD
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import layers
from pretrain.weights import Lazy, Source, check_tensors, read_tensors

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
DENSE_TOWER = "text"
_HEAD_DIM = {"llama": None, "qwen3": 128}
"""model_type -> head_dim where config.json names none; None: hidden_size / num_attention_heads."""
_EXPRESSIBLE: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "feed-forwards are SwiGLU"),
    "attention_bias": (False, "no layer has a bias"),
    "mlp_bias": (False, "no layer has a bias"),
    "use_sliding_window": (False, "attention sees the whole document"),
    "quantization_config": (None, "weights must not be quantised; fetch the original model"),
}
"""config.json's field -> (the only value that can be expressed, why)."""


@dataclass(frozen=True)
class Part:
    """One of their tensors: some rows of one of ours."""

    name: str
    shape: tuple[int, ...]
    rotary: bool = False
    """Its rows are turned by RoPE, head by head."""


def parts(model: ModelConfig) -> dict[str, list[Part]]:
    """Our tensor -> theirs, whose rows follow each other in it. For a model with one shard of every part."""
    d, width, head = model.d_model, model.ffn_width, model.head_dim
    queries, keys = model.num_heads * head, model.kv_heads * head
    inside: dict[str, list[Part]] = {
        "attention.qkv.weight": [
            Part("self_attn.q_proj", (queries, d), rotary=True),
            Part("self_attn.k_proj", (keys, d), rotary=True),
            Part("self_attn.v_proj", (keys, d)),
        ],
        "attention.qk.weight": [
            Part("self_attn.q_norm", (head,), rotary=True),
            Part("self_attn.k_norm", (head,), rotary=True),
        ],
        "attention.out.weight": [Part("self_attn.o_proj", (d, queries))],
        "attention_norm.weight": [Part("input_layernorm", (d,))],
        "feed_forward.gate_up.weight": [Part("mlp.gate_proj", (width, d)), Part("mlp.up_proj", (width, d))],
        "feed_forward.down.weight": [Part("mlp.down_proj", (d, width))],
        "feed_forward_norm.weight": [Part("post_attention_layernorm", (d,))],
    }
    outside = {
        "embedding.weight": Part("model.embed_tokens.weight", (model.vocab_tokens, d)),
        "final_norm.weight": Part("model.norm.weight", (d,)),
        "head.weight": Part("lm_head.weight", (model.vocab_tokens, d)),
    }
    found = {}
    for layer in layers(model):
        (name,) = layer.names(model).values()
        if layer.stem in outside:
            found[name] = [outside[layer.stem]]
        else:
            _, index, stem = layer.stem.split(".", 2)
            at = f"model.layers.{index}."
            found[name] = [replace(part, name=f"{at}{part.name}.weight") for part in inside[stem]]
    return found


def open_hugging_face(folder: Path) -> Source:
    """A Llama or Qwen3 folder (config.json and safetensors) under our names, as a dense model.

    Raises ConfigError, naming config.json's field, for what this decoder cannot compute.
    """
    path = folder / CONFIG
    theirs = load_toml(path)
    model = read_model(path, theirs)
    expected = parts(model)
    tensors = {
        name: tensor
        for name, tensor in read_tensors(folder).items()
        if not name.endswith("rotary_emb.inv_freq")  # a table that files of early Llama models hold
    }
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if theirs.get("tie_word_embeddings", False) and embedding in tensors:
        tensors[head] = tensors[embedding]
    shapes = {part.name: part.shape for each in expected.values() for part in each}
    check_tensors(folder, tensors, shapes, f"a {theirs['model_type']} model of its {CONFIG}")
    ours = {name: _joined([(tensors[p.name], p) for p in each], model) for name, each in expected.items()}
    return Source(folder, model, ours, name=folder.resolve().name)


def read_model(path: Path, theirs: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of what a config.json describes, with one tower."""
    kind = theirs.get("model_type")
    if kind not in _HEAD_DIM:
        why = {
            "qwen2": " (Qwen 2 and 2.5 add biases to queries, keys and values; no layer here has one)",
            "mistral": " (Mistral's attention may slide)",
        }.get(str(kind), "")
        raise ConfigError(
            f'{path}: model_type = "{kind}" cannot be expressed{why}; legal: {", ".join(_HEAD_DIM)}'
        )
    for field, (legal, why) in _EXPRESSIBLE.items():
        if (value := theirs.get(field)) not in (None, legal):
            raise ConfigError(f"{path}: {field} = {value} cannot be expressed: {why}; legal: {legal}")
    rope = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}  # the latter before version 5
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or rope.get("partial_rotary_factor", 1) != 1:
        raise ConfigError(
            f"{path}: rope_scaling = {rope} cannot be expressed: RoPE turns all pairs by unscaled angles; "
            "import a model without scaling, such as the one that this one was extended from"
        )
    needed = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
        "max_position_embeddings", "rms_norm_eps",
    )  # fmt: skip
    if absent := [field for field in needed if theirs.get(field) is None]:
        raise ConfigError(f"{path}: {', '.join(absent)}: required, but missing; fetch the file again")
    d, heads = theirs["hidden_size"], theirs["num_attention_heads"]
    head_dim = theirs.get("head_dim") or _HEAD_DIM[kind]
    return validate(
        ModelConfig,
        {
            "num_layers": theirs["num_hidden_layers"],
            "d_model": d,
            "num_heads": heads,
            "num_kv_heads": theirs.get("num_key_value_heads"),
            "head_size": None if head_dim is None or head_dim * heads == d else head_dim,
            "ffn_hidden": theirs["intermediate_size"],
            "context_tokens": theirs["max_position_embeddings"],
            "vocab_tokens": theirs["vocab_size"],
            "towers": {DENSE_TOWER: DENSE_TOWER},
            "norm_placement": "pre",
            "qk_norm": kind == "qwen3",
            "norm_eps": theirs["rms_norm_eps"],
            "rope_theta": rope.get("rope_theta", theirs.get("rope_theta", 10_000.0)),
        },
        source=str(path),
    )


def to_hugging_face(source: Source) -> tuple[Source, dict[str, Any]]:
    """The same weights under their names, and config.json. Raises ConfigError for what has no place there."""
    model, theirs = source.model, {}
    if model.norm_placement != "pre":
        raise ConfigError(
            f'{source.path}: model.norm_placement = "{model.norm_placement}" cannot be expressed as Llama or '
            "Qwen3, whose norms stand before the sublayers; use --format motley"
        )
    if split := [part for part in ("attention", "feed_forward", "norm") if len(model.shards_of(part)) > 1]:
        raise ConfigError(
            f"{source.path}: model.untied = {split} over the towers {', '.join(model.tower_names)} cannot be "
            "expressed as Llama or Qwen3, which have one set of weights; use --format motley"
        )
    for name, each in parts(model).items():
        rows = [part.shape[0] for part in each]
        for number, part in enumerate(each):
            theirs[part.name] = Lazy(part.shape, _cut(source.tensors[name], rows, number, part, model))
    return replace(source, tensors=theirs), config_of(model)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """config.json, in the form that transformers 4 and 5 read."""
    kind = "qwen3" if model.qk_norm else "llama"
    return {
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "model_type": kind,
        "hidden_size": model.d_model,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn_width,
        "vocab_size": model.vocab_tokens,
        "max_position_embeddings": model.context_tokens,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "initializer_range": model.init_std,
        "tie_word_embeddings": False,
        **{field: legal for field, (legal, _) in _EXPRESSIBLE.items() if legal is not None},
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }


def _joined(theirs: list[tuple[Lazy, Part]], model: ModelConfig) -> Lazy:
    rows = sum(tensor.shape[0] for tensor, _ in theirs)

    def read() -> "Tensor":
        import torch

        each = [_to_pairs(t.read(), model.head_dim) if part.rotary else t.read() for t, part in theirs]
        return each[0] if len(each) == 1 else torch.cat(each)

    return Lazy((rows, *theirs[0][0].shape[1:]), read)


def _cut(ours: Lazy, rows: list[int], number: int, part: Part, model: ModelConfig) -> Callable[[], "Tensor"]:
    def read() -> "Tensor":
        piece = ours.read().split(rows)[number]
        return _to_halves(piece, model.head_dim) if part.rotary else piece

    return read


def _to_pairs(rows: "Tensor", head_dim: int) -> "Tensor":
    """Rows of heads from (x[i], x[i + head_dim / 2]) to (x[2i], x[2i + 1]) turned together."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _to_halves(rows: "Tensor", head_dim: int) -> "Tensor":
    """The inverse of `_to_pairs`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
