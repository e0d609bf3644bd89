"""One block of the decoder: attention and feed-forward, each added to the residual stream through a norm."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.collectives import ONE_RANK, TensorParallel, own_chunk, whole_rows
from parallel.routing import Routing
from parallel.towers import TowerNorm
from pretrain.models.attention import Attention
from pretrain.models.attention_mask import AttentionMask, QueryMask
from pretrain.models.config import ModelConfig
from pretrain.models.depth import Chosen, DepthRouting
from pretrain.models.depth_gates import add_gated
from pretrain.models.feed_forward import ExpertFeedForward, FeedForward
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.inputs import ModelInputs
from pretrain.models.query_key import Rotary
from pretrain.models.routing_state import RoutingState, uncounted

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
        tp: TensorParallel = ONE_RANK,
        activation_checkpointing: bool = False,
        sublayers: tuple[Sublayer, ...] = SUBLAYERS,
        depth: DepthRouting | None = None,
    ) -> None:
        """`sublayers`: those of the block that this pipeline stage holds. `depth`: where not all tokens run;
        such a block is whole, and works on the whole stream."""
        super().__init__()
        self.tp, self.depth = tp, depth
        if depth is not None:
            assert sublayers == SUBLAYERS, sublayers
            tp = replace(tp, sequence_parallel=False)
        self.sublayers = sublayers
        self.post = config.norm_placement == "post"
        self.activation_checkpointing = activation_checkpointing
        norm_shards = config.shards_of("norm")
        if "attention" in sublayers:
            self.attention = Attention(config, f"{name}.attention", weights, tp=tp)
            self.attention_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, tp=tp)
        if "feed_forward" in sublayers:
            feed_forward = ExpertFeedForward if config.experts else FeedForward
            self.feed_forward = feed_forward(config, f"{name}.feed_forward", weights, tp=tp)
            self.feed_forward_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, tp=tp)

    def forward(
        self,
        x: Float[Tensor, "rows d_model"],
        routing: Routing,
        mask: AttentionMask,
        rotary: Rotary,
        inputs: ModelInputs | None = None,
    ) -> Float[Tensor, "rows d_model"]:
        """`x`, `rotary` and the result are sorted by tower; `mask` is in sequence order. With sequence
        parallel `x` and the result are this rank's chunk of the sorted stream; all else is whole. `inputs`:
        what routing and mask are of; for depth routing, and for experts that choose by thresholds."""
        if self.depth is not None:
            assert inputs is not None
            return self._forward_routed(x, inputs, rotary, self.depth)
        routing_state = None if inputs is None else inputs.routing_state
        return self._run(self._forward, x, routing, mask, rotary, routing_state)

    def _run(self, part: Callable[..., Tensor], *args: object) -> Tensor:
        if self.activation_checkpointing and self.training:
            # Nothing here draws random numbers, so their state need not be kept for the second forward.
            return checkpoint(  # type: ignore[return-value]
                part,
                *args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (nullcontext(), uncounted(self)),
            )
        return part(*args)

    def _forward(
        self,
        x: Tensor,
        routing: Routing,
        mask: AttentionMask,
        rotary: Rotary,
        routing_state: RoutingState | None,
    ) -> Tensor:
        if "attention" in self.sublayers:
            x = x + self._attended(x, routing, mask, rotary)
        if "feed_forward" in self.sublayers:
            x = x + self._fed_forward(x, routing, routing_state)
        return x

    def _attended(self, x: Tensor, routing: Routing, mask: AttentionMask, rotary: Rotary) -> Tensor:
        """What attention adds to x."""
        counts = routing.counts
        if self.post:
            return self.attention_norm(self.attention(x, routing, mask, rotary), counts)
        return self.attention(self.attention_norm(x, counts), routing, mask, rotary)

    def _fed_forward(self, x: Tensor, routing: Routing, routing_state: RoutingState | None) -> Tensor:
        """What the feed-forward adds to x."""
        counts = routing.counts
        if self.post:
            return self.feed_forward_norm(self.feed_forward(x, routing, routing_state), counts)
        return self.feed_forward(self.feed_forward_norm(x, counts), routing, routing_state)

    def _forward_routed(self, x: Tensor, inputs: ModelInputs, rotary: Rotary, depth: DepthRouting) -> Tensor:
        x = whole_rows(x, self.tp)
        if depth.style.parts == "feed_forward":
            x = x + self._run(self._attended, x, inputs.routing, inputs.mask, rotary)
        # Outside of what is computed twice: the same tokens run again, and are counted once.
        chosen = depth(x, inputs)
        x = self._run(self._through, x, chosen.gates, chosen, inputs, rotary, depth)
        return own_chunk(x, self.tp)

    def _through(
        self,
        x: Tensor,
        gates: Tensor,
        chosen: Chosen,
        inputs: ModelInputs,
        rotary: Rotary,
        depth: DepthRouting,
    ) -> Tensor:
        """The stream after the chosen tokens have run. See DepthConfig.scale."""
        rows, scale = chosen.tokens.rows, depth.style.scale
        before = x.index_select(0, rows)
        added, attended = [], before
        if depth.style.parts != "feed_forward":
            added.append(self._chosen_attended(x, before, chosen, inputs.routing, rotary))
            attended = before + added[0]
        fed = self._fed_forward(attended, chosen.tokens.routing, inputs.routing_state)
        if scale == "all":
            return (gates * x.index_copy(0, rows, attended + fed)).to(x.dtype)
        chosen_gates = gates.index_select(0, rows)
        if scale == "all_as_released":
            ran = attended + (chosen_gates * fed).to(x.dtype)
            return (gates * x).to(x.dtype).index_copy(0, rows, ran)
        return add_gated(x, rows, chosen_gates, *added, fed)

    def _chosen_attended(
        self, x: Tensor, before: Tensor, chosen: Chosen, routing: Routing, rotary: Rotary
    ) -> Tensor:
        """What attention adds to the chosen tokens, `before` of `x`."""
        tokens = chosen.tokens
        if not isinstance(tokens.mask, QueryMask):
            return self._attended(before, tokens.routing, tokens.mask, rotary.index_select(0, tokens.rows))
        if self.post:
            seen = self.attention.of_queries(before, tokens, x, routing, rotary)
            return self.attention_norm(seen, tokens.routing.counts)
        x = self.attention_norm(x, routing.counts)
        return self.attention.of_queries(x.index_select(0, tokens.rows), tokens, x, routing, rotary)
