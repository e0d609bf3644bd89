"""One block of the decoder: attention and feed-forward, each added to the residual stream through a norm."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.collectives import ONE_RANK, TensorAxis
from parallel.routing import Routing
from parallel.towers import TowerNorm
from pretrain.models.attention import Attention
from pretrain.models.attention_mask import AttentionMask
from pretrain.models.config import ModelConfig
from pretrain.models.feed_forward import ExpertFeedForward, FeedForward
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.query_key import Rotary

Sublayer = Literal["attention", "feed_forward"]
SUBLAYERS: tuple[Sublayer, ...] = ("attention", "feed_forward")
"""In their order. A pipeline stage may hold one of them without the other."""


class Block(nn.Module):
    """post: x + norm(f(x)) (MoT, arXiv 2411.04996 Eq. 1-2); pre: x + f(norm(x)) (Llama)."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        weights: InitialWeights,
        *,
        axis: TensorAxis = ONE_RANK,
        activation_checkpointing: bool = False,
        sublayers: tuple[Sublayer, ...] = SUBLAYERS,
    ) -> None:
        """`sublayers`: those of the block that this pipeline stage holds."""
        super().__init__()
        self.sublayers = sublayers
        self.post = config.norm_placement == "post"
        self.activation_checkpointing = activation_checkpointing
        norm_shards = config.shards_of("norm")
        if "attention" in sublayers:
            self.attention = Attention(config, f"{name}.attention", weights, axis=axis)
            self.attention_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, axis=axis)
        if "feed_forward" in sublayers:
            feed_forward = ExpertFeedForward if config.experts else FeedForward
            self.feed_forward = feed_forward(config, f"{name}.feed_forward", weights, axis=axis)
            self.feed_forward_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, axis=axis)

    def forward(
        self, x: Float[Tensor, "rows d_model"], routing: Routing, mask: AttentionMask, rotary: Rotary
    ) -> Float[Tensor, "rows d_model"]:
        """`x`, `rotary` and the result are sorted by tower; `mask` is in sequence order. With sequence
        parallel `x` and the result are this rank's chunk of the sorted stream; all else is whole."""
        if self.activation_checkpointing and self.training:
            # Nothing here draws random numbers, so their state need not be kept for the second forward.
            return checkpoint(
                self._forward, x, routing, mask, rotary, use_reentrant=False, preserve_rng_state=False
            )
        return self._forward(x, routing, mask, rotary)

    def _forward(self, x: Tensor, routing: Routing, mask: AttentionMask, rotary: Rotary) -> Tensor:
        counts = routing.counts
        if "attention" in self.sublayers and self.post:
            x = x + self.attention_norm(self.attention(x, routing, mask, rotary), counts)
        elif "attention" in self.sublayers:
            x = x + self.attention(self.attention_norm(x, counts), routing, mask, rotary)
        if "feed_forward" in self.sublayers and self.post:
            x = x + self.feed_forward_norm(self.feed_forward(x, routing), counts)
        elif "feed_forward" in self.sublayers:
            x = x + self.feed_forward(self.feed_forward_norm(x, counts), routing)
        return x
