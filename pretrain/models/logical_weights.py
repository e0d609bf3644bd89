"""Names and shapes of a decoder's weights, as one process holds them. Imports no torch."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from pretrain.models.config import ModelConfig, Norm, Part
from pretrain.models.vectors_config import TIME_FEATURES


@dataclass(frozen=True)
class Layer:
    """The weights of one layer: `stem`.`shard` for each weight shard of the part."""

    stem: str
    part: Part | Literal["depth"]
    """depth: a depth router, of one modality's tower. vectors: adapters, of one modality."""
    shape: tuple[int, ...]
    only: tuple[str, ...] = ()
    """The shards that are meant, where not all are alike. Empty: all of the part."""

    @property
    def cut(self) -> bool:
        """Whether tensor-parallel ranks hold parts of it. Of what is not decayed, only a matrix's bias is.
        Adapters of vectors are whole on every rank."""
        if self.part == "vectors":
            return False
        return is_decayed(self.stem, self.shape) or self.stem.endswith(".qkv.bias")

    def names(self, model: ModelConfig) -> dict[str, str]:
        """Shard -> logical name."""
        shards = self.only if self.part == "depth" else self.only or model.shards_of(self.part)
        return {shard: f"{self.stem}.{shard}" for shard in shards}

    @property
    def leaves(self) -> bool:
        """Whether it is an adapter that stands behind the final norm; other adapters stand beside the
        embedding."""
        return ".leave." in self.stem

    @property
    def of_vocabulary(self) -> bool:
        """Whether it has a row for every id: embedding and head."""
        return self.part in ("embedding", "head")


def is_router(name: str) -> bool:
    """Whether a weight scores tokens: such weights are whole on every rank and never decayed."""
    return ".router." in name


def is_decayed(name: str, shape: tuple[int, ...]) -> bool:
    """Whether weight decay acts on a parameter: on matrices, but not on routers."""
    return len(shape) > 1 and not is_router(name)


def width_role(name: str) -> Literal["outer", "hidden", "router"]:
    """Return what a matrix is to the maximal update parametrisation: "hidden" if both its sides grow with the
    width, "router" if it maps features to experts, "outer" for embedding and head. `name` may end with the
    tower."""
    if not name.startswith("blocks."):
        return "outer"
    return "router" if is_router(f"{name}.") else "hidden"


def layers(model: ModelConfig) -> Iterator[Layer]:
    """All layers of the decoder that have weights."""
    return (layer for layer, _ in counted_layers(model, apart=True))


def counted_layers(model: ModelConfig, *, apart: bool) -> Iterator[tuple[Layer, int]]:
    """All layers of the decoder that have weights, and for how many each stands: with `apart` for itself,
    otherwise for those of all blocks with the same depth routers as the first such block."""
    routed = [tuple(ratios) for ratios in model.ratios_of_layers()]
    alike = Counter(routed)
    kinds = enumerate(routed) if apart else ((routed.index(modalities), modalities) for modalities in alike)
    yield Layer("embedding.weight", "embedding", (model.vocab_tokens, model.d_model)), 1
    for index, modalities in kinds:
        for layer in _block(model, f"blocks.{index}.", modalities):
            yield layer, 1 if apart else alike[modalities]
    for layer in _norm("final_norm", "final_norm", model.norm, model.d_model):
        yield layer, 1
    if not model.tied_embeddings:
        yield Layer("head.weight", "head", (model.vocab_tokens, model.d_model)), 1
    for layer in _vectors(model):
        yield layer, 1


def _block(model: ModelConfig, at: str, routed: Iterable[str]) -> Iterator[Layer]:
    """A block with depth routers of the modalities `routed`."""
    d, queries = model.d_model, model.num_heads * model.head_dim
    for modality in routed:
        yield Layer(f"{at}depth.{modality}.weight", "depth", (d,), (model.towers[modality],))
    yield Layer(at + "attention.qkv.weight", "qkv", (model.qkv_features, d))
    if model.qkv_bias:
        yield Layer(at + "attention.qkv.bias", "qkv", (model.qkv_features,))
    if model.query_key_norm:
        yield from _norm(at + "attention.qk", "qk_norm", model.query_key_norm, 2 * model.head_dim)
    yield Layer(at + "attention.out.weight", "attention_out", (d, queries))
    yield from _norm(at + "attention_norm", "block_norm", model.norm, d)
    yield from _feed_forward(model, at + "feed_forward.")
    yield from _norm(at + "feed_forward_norm", "block_norm", model.norm, d)


def _norm(stem: str, part: Part, kind: Norm, features: int) -> Iterator[Layer]:
    """A weight, and of LayerNorm a bias."""
    yield Layer(f"{stem}.weight", part, (features,))
    if kind == "layer":
        yield Layer(f"{stem}.bias", part, (features,))


def _feed_forward(model: ModelConfig, at: str) -> Iterator[Layer]:
    """A shard with experts has theirs stacked, and a router."""
    d, part = model.d_model, "feed_forward"
    if not model.experts:
        yield Layer(at + "gate_up.weight", part, (2 * model.ffn_width, d))
        yield Layer(at + "down.weight", part, (d, model.ffn_width))
        return
    shards = []
    for shard in model.shards_of(part):
        experts = model.experts_of(shard)
        shards.append((shard, (experts.num_experts,) if experts else (), model.width_of(shard)))
    for shard, stacked, width in shards:
        yield Layer(at + "gate_up.weight", part, (*stacked, 2 * width, d), (shard,))
    for shard, stacked, width in shards:
        yield Layer(at + "down.weight", part, (*stacked, d, width), (shard,))
    for shard, stacked, _ in shards:
        if stacked:
            yield Layer(at + "router.weight", part, (*stacked, d), (shard,))


def _vectors(model: ModelConfig) -> Iterator[Layer]:
    """The adapters of modalities of vectors: into the stream, of times, and out of it."""
    d, wide = model.d_model, TIME_FEATURES
    for modality, own in model.vectors.items():
        shapes = {"enter": (d, own.features)}
        if own.learns:
            shapes |= {"time_hidden": (wide, wide), "time": (d, wide), "leave": (own.features, d)}
        for name, shape in shapes.items():
            at, only = f"vectors.{modality}.{name}", (model.vectors_shard(modality),)
            yield Layer(f"{at}.weight", "vectors", shape, only)
            yield Layer(f"{at}.bias", "vectors", shape[:1], only)


def logical_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Logical name -> whole shape of every parameter."""
    return {name: layer.shape for layer in layers(model) for name in layer.names(model).values()}
