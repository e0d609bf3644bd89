"""Names and shapes of a decoder's weights, as one process holds them. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from pretrain.models.config import SHARED_TOWER, ModelConfig, UntiedPart


@dataclass(frozen=True)
class Layer:
    """The weights of one layer: `stem`.`shard` for each weight shard of the part."""

    stem: str
    part: UntiedPart | None
    """None: embedding and head, one for all towers."""
    shape: tuple[int, ...]

    def names(self, model: ModelConfig) -> dict[str, str]:
        """Shard -> logical name."""
        shards = model.shards_of(self.part) if self.part else (SHARED_TOWER,)
        return {shard: f"{self.stem}.{shard}" for shard in shards}


def layers(model: ModelConfig) -> Iterator[Layer]:
    """All layers of the decoder that have weights."""
    d, width = model.d_model, model.ffn_width
    queries, keys = model.num_heads * model.head_dim, model.kv_heads * model.head_dim
    yield Layer("embedding.weight", None, (model.vocab_tokens, d))
    for index in range(model.num_layers):
        at = f"blocks.{index}."
        yield Layer(at + "attention.qkv.weight", "attention", (queries + 2 * keys, d))
        if model.qk_norm:
            yield Layer(at + "attention.qk.weight", "attention", (2 * model.head_dim,))
        yield Layer(at + "attention.out.weight", "attention", (d, queries))
        yield Layer(at + "attention_norm.weight", "norm", (d,))
        yield Layer(at + "feed_forward.gate_up.weight", "feed_forward", (2 * width, d))
        yield Layer(at + "feed_forward.down.weight", "feed_forward", (d, width))
        yield Layer(at + "feed_forward_norm.weight", "norm", (d,))
    yield Layer("final_norm.weight", "norm", (d,))
    yield Layer("head.weight", None, (model.vocab_tokens, d))


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name -> whole shape of every parameter."""
    return {name: layer.shape for layer in layers(model) for name in layer.names(model).values()}
