"""The shape of a decoder: how deep, how wide, and which weights are untied per modality. Imports no torch."""

from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from pretrain.models.depth_config import DepthBlockConfig, DepthConfig
from pretrain.models.experts_config import ExpertsConfig, Size
from pretrain.models.rope_config import RopeScalingConfig
from pretrain.models.vectors_config import VectorsConfig

MAX_LAYERS = 1_024
"""A little more than the 1,000 of the deepest Transformer that was published (DeepNet, arXiv 2203.00555).
Accounts list every layer, so a slip of the keyboard would keep them busy for hours."""

Part = Literal[
    "embedding", "qkv", "qk_norm", "attention_out", "feed_forward", "block_norm", "final_norm", "head",
    "vectors",
]  # fmt: skip
"""The parts of a decoder whose weights are either untied, one shard per tower, or tied, one shard for all."""
PARTS: tuple[Part, ...] = get_args(Part)
SHORTHANDS: dict[str, tuple[Part, ...]] = {
    "attention": ("qkv", "qk_norm", "attention_out"),
    "norm": ("block_norm", "final_norm"),
}
"""Names that stand for several parts in `untied`."""
UntiedPart = Part | Literal["attention", "norm"]
Norm = Literal["rms", "layer"]

SHARED_TOWER = "shared"
"""Name of the one weight shard of a part that all towers share (embedding, head, tied parts)."""


class ModelConfig(BaseModel):
    """One decoder. Dense is one tower for all modalities, MoT a tower per modality; nothing else differs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: int = Field(gt=0, le=MAX_LAYERS)
    d_model: Size
    num_heads: Size
    num_kv_heads: Size | None = None
    """None: as many as num_heads (no grouped queries)."""
    head_size: Size | None = None
    """Features of a head. None: d_model / num_heads; Qwen3's small models have more."""
    ffn_hidden: Size | None = None
    """SwiGLU width. None: 8 d_model / 3 rounded up to a multiple of 256 (MoT's code)."""
    context_tokens: Size
    vocab_tokens: Size
    """Rows of embedding and head; at least the size of the data's vocabulary."""
    towers: dict[str, str] = Field(min_length=1, max_length=16)
    """Modality -> tower, in the vocabulary's order of modalities."""
    untied: tuple[UntiedPart, ...] = ("attention", "feed_forward", "norm")
    """Parts with one weight shard per tower; the others share one (MoT Fig. 14). attention: the projections
    of queries, keys and values (qkv), their norms (qk_norm) and the output projection (attention_out). norm:
    the norms of blocks (block_norm) and the one before the head (final_norm). embedding: a token's row is
    that of the tower of its modality. head: the tower of the token that predicts, over all ids. vectors: the
    adapters of a modality of vectors, which are its own anyway, count to its tower."""
    towers_start: Literal["copies", "independent"] = "copies"
    """copies: the weight shards of a layer start as one draw. independent: those of the first tower start as
    that draw, those of every other tower as one of their own."""
    tied_embeddings: bool = False
    """Whether the head has the weights of the embedding, as in small Llama and Qwen models."""
    experts: dict[str, ExpertsConfig] = {}
    """Tower -> experts in its feed-forward; a tower that is not named has one feed-forward."""
    depth: dict[str, DepthConfig] = {}
    """Modality -> which of its tokens run in which layers; a modality that is not named runs in all."""
    depth_block: DepthBlockConfig = DepthBlockConfig()
    """What blocks with depth routers do, one for the tokens of all modalities."""
    vectors: dict[str, VectorsConfig] = {}
    """Modality of vectors -> its adapters and its objective; all other modalities are ids."""
    norm_placement: Literal["post", "pre"] = "post"
    """post: norm on the sublayer output before the residual add (MoT Eq. 1-2); pre: Llama."""
    norm: Norm = "rms"
    """Norms of sublayers and the final norm: RMSNorm, or LayerNorm, which has a bias too."""
    qk_norm: bool | Norm = True
    """Norm of queries and keys, over the features of a head: true or "rms" is RMSNorm, "layer" LayerNorm
    (Chameleon, arXiv 2405.09818), false none."""
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm_eps: float | None = Field(None, gt=0)
    """eps of the norm of queries and keys. None: norm_eps."""
    qkv_bias: bool = False
    """Whether the projections to queries, keys and values have biases (Qwen2)."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability that a feature of a sublayer's output is 0 in a training step, before it is added to the
    residual stream; the others are divided by 1 - dropout. Post norms come before it."""
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """The same for the output of the embedding."""
    rope_theta: float = Field(10_000.0, gt=0)
    rope_scaling: RopeScalingConfig | None = None
    """None: the frequencies of RoPE are not scaled."""
    init_std: float = Field(0.02, gt=0)
    mup_base_width: Size | None = None
    """d_model of the model at which learning rate and init_std were tuned. Initial values, rates, weight
    decay and logits then follow the width (maximal update parametrisation, arXiv 2203.03466, table 8 for
    Adam): see width_ratio. None, or d_model itself: nothing is scaled."""
    z_loss: float = Field(0.0, ge=0)
    """Weight of log^2 Z per token (Chameleon: 1e-5)."""

    @field_validator("qk_norm")
    @classmethod
    def _one_name(cls, qk_norm: bool | Norm) -> bool | Norm:
        """One value for RMSNorm, so that equal models compare equal."""
        return True if qk_norm == "rms" else qk_norm

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.head_size is None and self.d_model % self.num_heads:
            raise ValueError(
                f"d_model = {self.d_model} is not divisible by num_heads = {self.num_heads}; change either, "
                "or set head_size"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"a head of {self.head_dim} features (head_size, or d_model / num_heads) is odd, but RoPE "
                "rotates pairs; change either"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not divisible by num_kv_heads = {self.kv_heads}"
            )
        if SHARED_TOWER in self.towers.values():
            raise ValueError(
                f'a tower may not be called "{SHARED_TOWER}": that names weights all towers share'
            )
        if any("." in name for name in self.towers.values()):
            raise ValueError(f"tower names may not contain a dot: {sorted(set(self.towers.values()))}")
        self._check_weights()
        self._check_elements()
        for tower in self.experts:
            if tower not in self.tower_names:
                raise ValueError(f'experts."{tower}": no such tower; legal: {", ".join(self.tower_names)}')
        if self.experts and "feed_forward" not in self.untied and len(self.tower_names) > 1:
            raise ValueError(
                f"experts of {', '.join(self.experts)}, but towers {', '.join(self.tower_names)} share one "
                'feed-forward; add "feed_forward" to untied, or give all modalities one tower'
            )
        for tower, experts in self.experts.items():
            if self.norm_placement == "post" and experts.chooses_one:
                raise ValueError(
                    f'experts.{tower}: routing = "token_choice" with top_k = 1, but norm_placement = "post": '
                    "the norm behind the feed-forward takes the one gate of a token out again, so the router "
                    'would not learn from the loss; set top_k = 2 or more, or norm_placement = "pre"'
                )
        self._check_depth()
        return self

    def _check_weights(self) -> None:
        named = [part for name in self.untied for part in SHORTHANDS.get(name, (name,))]
        if twice := sorted({part for part in named if named.count(part) > 1}):
            shorthands = "; ".join(f'"{name}" stands for {", ".join(of)}' for name, of in SHORTHANDS.items())
            raise ValueError(f"untied names {', '.join(twice)} twice: {list(self.untied)}; {shorthands}")
        if "qk_norm" in self.untied and not self.qk_norm:
            raise ValueError(
                'untied names "qk_norm", but qk_norm = false: there are no such weights; leave it out'
            )
        if self.tied_embeddings and ("embedding" in named) != ("head" in named):
            raise ValueError(
                "tied_embeddings = true gives the head the embedding's weights, so both are untied or none: "
                f"untied names one of them: {list(self.untied)}"
            )

    def _check_elements(self) -> None:
        if self.qk_norm_eps is not None and not self.qk_norm:
            raise ValueError(
                f"qk_norm_eps = {self.qk_norm_eps}, but qk_norm = false: queries and keys have no norm; "
                'leave qk_norm_eps out, or set qk_norm = true or "layer"'
            )
        if self.rope_scaling and self.rope_scaling.kind == "yarn" and self.rope_theta <= 1:
            raise ValueError(
                f'rope_theta = {self.rope_theta} with rope_scaling.kind = "yarn": its ramp goes from fast '
                "pairs to slow ones, which are slow only if rope_theta is more than 1 (Llama: 10000)"
            )

    def _check_depth(self) -> None:
        for modality, depth in self.depth.items():
            if modality not in self.towers:
                raise ValueError(f'depth."{modality}": no such modality; legal: {", ".join(self.modalities)}')
            try:
                depth.ratios(self.num_layers)
            except ValueError as error:
                raise ValueError(f"depth.{modality}: {error}") from None
        if not self.depth and self.depth_block != DepthBlockConfig():
            raise ValueError(
                "depth_block is set, but no block has depth routers: there is no model.depth.<modality>; add "
                f"one (modalities: {', '.join(self.modalities)}), or leave depth_block out"
            )

    @model_validator(mode="after")
    def _check_vectors(self) -> "ModelConfig":
        for modality in self.vectors:
            if modality not in self.towers or modality == self.modalities[0]:
                legal = ", ".join(self.modalities[1:]) or "none, there is text alone"
                raise ValueError(f'vectors."{modality}": no modality that may be vectors; legal: {legal}')
            if modality in self.depth:
                raise ValueError(
                    f"depth.{modality}: vectors run in all layers, because an image is denoised as a whole; "
                    f"take depth.{modality} out"
                )
        if "vectors" in self.untied and not self.vectors:
            raise ValueError('untied names "vectors", but no model.vectors.<modality> is set; leave it out')
        return self

    def depth_ratios(self, layer: int) -> dict[str, float]:
        """Modality -> share of its tokens that run in the layer after warm-up, of those with a router
        there."""
        found = {m: depth.ratios(self.num_layers)[layer] for m, depth in self.depth.items()}
        return {modality: ratio for modality, ratio in found.items() if ratio is not None}

    def ratios_of_layers(self) -> list[dict[str, float]]:
        """Return `depth_ratios` of every layer, for the price of few; layers that are alike share one
        dictionary."""
        rows = list(zip(*(depth.ratios(self.num_layers) for depth in self.depth.values()), strict=True))
        named = {row: zip(self.depth, row, strict=True) for row in set(rows)}
        routed = {row: {m: r for m, r in pairs if r is not None} for row, pairs in named.items()}
        return [routed[row] for row in rows] or [{}] * self.num_layers

    @property
    def whole_blocks(self) -> tuple[int, ...]:
        """Layers that no pipeline stage may cut: those with a depth router."""
        return tuple(layer for layer, ratios in enumerate(self.ratios_of_layers()) if ratios)

    @property
    def is_causal(self) -> bool:
        """Whether no token's result depends on later tokens: rules and gates of depth, and experts."""
        return all(depth.is_causal for depth in self.depth.values()) and all(
            experts.causal for experts in self.experts.values()
        )

    @property
    def has_causal_form(self) -> bool:
        """Whether it would be causal if routers of depth and of experts chose by thresholds."""
        return all(depth.has_causal_gate for depth in self.depth.values())

    @property
    def base_width(self) -> int:
        """mup_base_width, or d_model without it."""
        return self.mup_base_width or self.d_model

    @property
    def width_ratio(self) -> float:
        """The ratio says how many times wider than the base model this one is. Matrices of blocks start
        1 / sqrt(ratio) as large and learn 1 / ratio as fast; routers of experts start and learn 1 / ratio as
        much; logits are divided by the ratio. Attention keeps 1 / sqrt(head_dim), because a family of models
        grows by heads of one size."""
        return self.d_model / self.base_width

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_dim(self) -> int:
        return self.head_size or self.d_model // self.num_heads

    @property
    def query_key_norm(self) -> Norm | None:
        """The kind of `qk_norm`; None: queries and keys have no norm."""
        if isinstance(self.qk_norm, bool):
            return "rms" if self.qk_norm else None
        return self.qk_norm

    @property
    def query_key_eps(self) -> float:
        return self.norm_eps if self.qk_norm_eps is None else self.qk_norm_eps

    @property
    def qkv_features(self) -> int:
        """Features of a token's queries, keys and values together."""
        return (self.num_heads + 2 * self.kv_heads) * self.head_dim

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0 or self.embedding_dropout > 0

    @property
    def ffn_width(self) -> int:
        return self.ffn_hidden or -(-8 * self.d_model // (3 * 256)) * 256

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.towers)

    @property
    def tower_names(self) -> tuple[str, ...]:
        """Distinct towers, in order of first use: the order of the sorted stream."""
        return tuple(dict.fromkeys(self.towers.values()))

    @property
    def tower_of_modality(self) -> tuple[int, ...]:
        """Index into tower_names for each modality, in the order of `modalities`."""
        return tuple(self.tower_names.index(tower) for tower in self.towers.values())

    def experts_of(self, shard: str) -> ExpertsConfig | None:
        """Return the experts of a feed-forward's weight shard, or None where it is one feed-forward."""
        return self.experts.get(self.tower_names[0] if shard == SHARED_TOWER else shard)

    def width_of(self, shard: str) -> int:
        """SwiGLU width of a feed-forward's weight shard, of one expert where it has experts."""
        experts = self.experts_of(shard)
        return (experts.ffn_hidden if experts else None) or self.ffn_width

    @property
    def expert_widths(self) -> dict[str, int]:
        """Tower -> width of one of its experts."""
        return {tower: self.width_of(tower) for tower in self.experts}

    def feed_forward_parameters(self, shard: str, *, active: bool = False) -> int:
        """Return the number of parameters of one layer's feed-forward, without its norm; with `active`, of
        those that a token meets on average."""
        experts, one = self.experts_of(shard), 3 * self.d_model * self.width_of(shard)
        if experts is None:
            return one
        held = experts.experts_per_token if active else experts.num_experts
        return round(held * one) + experts.num_experts * self.d_model

    def shards_of(self, part: Part) -> tuple[str, ...]:
        """Names of the weight shards of a part: the towers if it is untied, else the one shared shard."""
        named = any(part in SHORTHANDS.get(name, (name,)) for name in self.untied)
        return self.tower_names if named else (SHARED_TOWER,)

    def vectors_shard(self, modality: str) -> str:
        """The weight shard that the adapters of a modality of vectors belong to."""
        return self.towers[modality] if "vectors" in self.untied else SHARED_TOWER

    @property
    def learned_vectors(self) -> tuple[str, ...]:
        """Modalities of vectors that have a loss, in the order of `modalities`."""
        return tuple(m for m in self.modalities if m in self.vectors and self.vectors[m].learns)

    @property
    def bidirectional(self) -> tuple[str, ...]:
        """Modalities of vectors whose images see themselves both ways."""
        return tuple(m for m in self.modalities if m in self.vectors and self.vectors[m].bidirectional)

    @property
    def tied_parts(self) -> tuple[str, ...]:
        """Parts with one weight shard for all towers, by their shorthand where all that it stands for are."""
        there: list[Part] = [part for part in PARTS if part != "vectors" or self.vectors]
        tied = [part for part in there if self.shards_of(part) == (SHARED_TOWER,)]
        whole = {part: name for name, parts in SHORTHANDS.items() if {*parts} <= {*tied} for part in parts}
        return tuple(dict.fromkeys(whole.get(part, part) for part in tied))
