"""Mixture-of-Transformers routed as its authors published it, with a boolean mask per modality.

Rows are gathered by mask before the layers of a modality and scattered by mask after them: for queries, keys
and values, for the attention output, and for the feed-forward (arXiv 2411.04996, Algorithm 1). The sorted
stream (parallel/routing.py) is compared with this. On a GPU every mask makes the host wait for the number of
its rows.
"""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pretrain.models.config import ModelConfig
from pretrain.models.cross_entropy import linear_cross_entropy
from pretrain.models.decoder import Decoder
from pretrain.models.query_key import Rotary, rotary_table

Masks = list[Bool[Tensor, " tokens"]]


def merge(pieces: Sequence[Tensor], masks: Masks) -> Tensor:
    """The rows of all modalities, at their positions in the sequence."""
    merged = pieces[0].new_empty(masks[0].shape[0], *pieces[0].shape[1:])
    for piece, mask in zip(pieces, masks, strict=True):
        merged[mask] = piece
    return merged


class ModalityLayers(nn.Module):
    """All layers of one modality in a block, with separate matrices."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, width, kv = config.d_model, config.ffn_width, config.kv_heads * config.head_dim
        self.query, self.key, self.value, self.out = (
            nn.Linear(d, rows, bias=False) for rows in (d, kv, kv, d)
        )
        self.query_norm, self.key_norm = (
            nn.RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.gate, self.up = nn.Linear(d, width, bias=False), nn.Linear(d, width, bias=False)
        self.down = nn.Linear(width, d, bias=False)
        self.attention_norm, self.feed_forward_norm = (nn.RMSNorm(d, config.norm_eps) for _ in range(2))


class PublishedBlock(nn.Module):
    """A post-norm block with a set of layers per modality; tokens stay in sequence order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.norm_placement == "post", "as published"
        self.head_dim = config.head_dim
        self.modalities = nn.ModuleList(ModalityLayers(config) for _ in config.tower_names)

    def forward(
        self, x: Float[Tensor, "tokens d_model"], masks: Masks, rotary: Rotary, sequences: int
    ) -> Float[Tensor, "tokens d_model"]:
        """Attention is causal within each of `sequences` equal parts of the tokens."""
        modalities = cast("Sequence[ModalityLayers]", self.modalities)
        queries, keys, values = [], [], []
        for layers, mask in zip(modalities, masks, strict=True):
            rows = x[mask]
            queries.append(layers.query_norm(self._heads(layers.query(rows))))
            keys.append(layers.key_norm(self._heads(layers.key(rows))))
            values.append(self._heads(layers.value(rows)))
        q, k, v = (merge(parts, masks) for parts in (queries, keys, values))
        q, k = (_turn(part, rotary) for part in (q, k))
        q, k, v = (part.unflatten(0, (sequences, -1)).transpose(1, 2) for part in (q, k, v))
        attended = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
        )
        attended = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        outs = [
            layers.attention_norm(layers.out(attended[mask]))
            for layers, mask in zip(modalities, masks, strict=True)
        ]
        x = x + merge(outs, masks)
        outs = []
        for layers, mask in zip(modalities, masks, strict=True):
            rows = x[mask]
            outs.append(layers.feed_forward_norm(layers.down(F.silu(layers.gate(rows)) * layers.up(rows))))
        return x + merge(outs, masks)

    def _heads(self, rows: Tensor) -> Tensor:
        return rows.view(rows.shape[0], rows.shape[1] // self.head_dim, self.head_dim)


class PublishedDecoder(nn.Module):
    """An embedding, published blocks, a norm per modality and a head; forward returns the summed loss."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_tokens, config.d_model)
        self.blocks = nn.ModuleList(PublishedBlock(config) for _ in range(config.num_layers))
        self.final_norm = nn.ModuleList(
            nn.RMSNorm(config.d_model, config.norm_eps) for _ in config.tower_names
        )
        self.head = nn.Linear(config.d_model, config.vocab_tokens, bias=False)

    def forward(
        self, ids: Tensor, targets: Tensor, tower: Tensor, positions: Tensor, sequences: int
    ) -> Float[Tensor, ""]:
        """The summed loss. All arguments are [tokens] in sequence order; `tower` holds indices of towers."""
        masks = [tower == index for index in range(len(self.final_norm))]
        rotary = rotary_table(positions, self.config.head_dim, self.config.rope_theta)
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x, masks, rotary, sequences)
        x = merge([norm(x[mask]) for norm, mask in zip(self.final_norm, masks, strict=True)], masks)
        return linear_cross_entropy(
            x, [self.head.weight], [len(x)], targets, torch.ones_like(targets, dtype=torch.float32)
        )[0]

    def copy_weights(self, decoder: Decoder) -> None:
        """Copy the weights of a Decoder of the same config, all of whose parts are untied."""
        config = self.config
        kv = config.kv_heads * config.head_dim
        with torch.no_grad():
            self.embedding.weight.copy_(decoder.get_parameter("embedding.weight.shared"))
            self.head.weight.copy_(decoder.get_parameter("head.weight.shared"))
            for index, tower in enumerate(config.tower_names):
                final = self.final_norm.get_parameter(f"{index}.weight")
                final.copy_(decoder.get_parameter(f"final_norm.weight.{tower}"))
                for ours, theirs in zip(self.blocks, decoder.blocks, strict=True):
                    layers = ours.get_submodule(f"modalities.{index}")
                    _copy_layers(layers, theirs, tower, (config.d_model, kv, kv))


def _copy_layers(ours: nn.Module, block: nn.Module, tower: str, qkv_rows: tuple[int, int, int]) -> None:
    def of(layer: str) -> Tensor:
        return block.get_parameter(f"{layer}.weight.{tower}")

    def put(names: Sequence[str], weights: Sequence[Tensor]) -> None:
        for name, weight in zip(names, weights, strict=True):
            ours.get_parameter(f"{name}.weight").copy_(weight)

    put(("query", "key", "value"), of("attention.qkv").split(qkv_rows))
    if isinstance(ours.get_submodule("query_norm"), nn.RMSNorm):
        put(("query_norm", "key_norm"), of("attention.qk").chunk(2))
    put(("gate", "up"), of("feed_forward.gate_up").chunk(2))
    put(
        ("out", "down", "attention_norm", "feed_forward_norm"),
        [of(name) for name in ("attention.out", "feed_forward.down", "attention_norm", "feed_forward_norm")],
    )


def _turn(x: Float[Tensor, "tokens heads head_dim"], rotary: Rotary) -> Tensor:
    turned = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)
