"""One block of the decoder: attention and feed-forward, each added to the residual stream through a norm."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

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
from pretrain.models.dropout import StreamDropout
from pretrain.models.feed_forward import ExpertFeedForward, FeedForward
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.inputs import ModelInputs
from pretrain.models.query_key import Rotary
from pretrain.models.router_report import BlockReport, ExpertCounts
from pretrain.models.routing_state import RoutingState

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
        self.tp, self.depth, self.name = tp, depth, name
        if depth is not None:
            assert sublayers == SUBLAYERS, sublayers
            tp = replace(tp, sequence_parallel=False)
        self.sublayers = sublayers
        self.post = config.norm_placement == "post"
        self.activation_checkpointing = activation_checkpointing
        norm_shards, norm = config.shards_of("block_norm"), config.norm
        if "attention" in sublayers:
            self.attention = Attention(config, f"{name}.attention", weights, tp=tp)
            self.attention_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, kind=norm, tp=tp)
        if "feed_forward" in sublayers:
            feed_forward = ExpertFeedForward if config.experts else FeedForward
            self.feed_forward = feed_forward(config, f"{name}.feed_forward", weights, tp=tp)
            self.feed_forward_norm = TowerNorm(config.d_model, norm_shards, config.norm_eps, kind=norm, tp=tp)

    def forward(
        self,
        x: Float[Tensor, "rows d_model"],
        routing: Routing,
        mask: AttentionMask,
        rotary: Rotary,
        inputs: ModelInputs | None = None,
        dropout: StreamDropout | None = None,
    ) -> tuple[Float[Tensor, "rows d_model"], BlockReport]:
        """The stream after the block, and what its routers report.

        `x`, `rotary` and the stream are sorted by tower; `mask` is in sequence order. With sequence parallel
        `x` and the result are this rank's chunk of the sorted stream; all else is whole. `inputs`: the
        micro-batch of `routing` and `mask`; needed for depth routing, and for experts that choose by
        thresholds. `dropout`: of the whole stream."""
        if self.depth is not None:
            assert inputs is not None
            return self._forward_routed(x, inputs, rotary, self.depth, dropout)
        routing_state = None if inputs is None else inputs.routing_state
        dropout = dropout and dropout.of_chunk(self.tp)
        x, experts = self._run(self._forward, x, routing, mask, rotary, routing_state, dropout)
        return x, BlockReport(experts=experts)

    def _run(self, part: Callable[..., Any], *args: object) -> Any:
        """part(*args), computed a second time in the backward pass with activation checkpointing."""
        if self.activation_checkpointing and self.training:
            # Nothing here asks a generator for random numbers (dropout hashes), so no state need be kept. The
            # results of the second forward are dropped: what is returned, counts included, is of the first.
            return checkpoint(part, *args, use_reentrant=False, preserve_rng_state=False)
        return part(*args)

    def _forward(
        self,
        x: Tensor,
        routing: Routing,
        mask: AttentionMask,
        rotary: Rotary,
        routing_state: RoutingState | None,
        dropout: StreamDropout | None,
    ) -> tuple[Tensor, dict[str, ExpertCounts]]:
        experts: dict[str, ExpertCounts] = {}
        if "attention" in self.sublayers:
            x = x + self._attended(x, routing, mask, rotary, dropout)
        if "feed_forward" in self.sublayers:
            added, experts = self._fed_forward(x, routing, routing_state, dropout)
            x = x + added
        return x, experts

    def _attended(
        self, x: Tensor, routing: Routing, mask: AttentionMask, rotary: Rotary, dropout: StreamDropout | None
    ) -> Tensor:
        """Return what attention adds to the residual stream x."""
        counts = routing.counts
        if self.post:
            seen = self.attention_norm(self.attention(x, routing, mask, rotary), counts)
        else:
            seen = self.attention(self.attention_norm(x, counts), routing, mask, rotary)
        return seen if dropout is None else dropout(seen, f"{self.name}.attention")

    def _fed_forward(
        self,
        x: Tensor,
        routing: Routing,
        routing_state: RoutingState | None,
        dropout: StreamDropout | None,
    ) -> tuple[Tensor, dict[str, ExpertCounts]]:
        """What the feed-forward adds to x, and what its experts' routers count."""
        counts = routing.counts
        if self.post:
            added, experts = self.feed_forward(x, routing, routing_state)
            added = self.feed_forward_norm(added, counts)
        else:
            added, experts = self.feed_forward(self.feed_forward_norm(x, counts), routing, routing_state)
        return added if dropout is None else dropout(added, f"{self.name}.feed_forward"), experts

    def _forward_routed(
        self,
        x: Tensor,
        inputs: ModelInputs,
        rotary: Rotary,
        depth: DepthRouting,
        dropout: StreamDropout | None,
    ) -> tuple[Tensor, BlockReport]:
        x = whole_rows(x, self.tp)
        if depth.config.parts == "feed_forward":
            x = x + self._run(self._attended, x, inputs.routing, inputs.mask, rotary, dropout)
        # Outside of what is computed twice, so that the same tokens run in both.
        chosen, report = depth(x, inputs)
        dropout = dropout and dropout.of_rows(chosen.tokens.rows)
        x, experts = self._run(self._through, x, chosen.gates, chosen, inputs, rotary, depth, dropout)
        return own_chunk(x, self.tp), replace(report, experts=experts)

    def _through(
        self,
        x: Tensor,
        gates: Tensor,
        chosen: Chosen,
        inputs: ModelInputs,
        rotary: Rotary,
        depth: DepthRouting,
        dropout: StreamDropout | None,
    ) -> tuple[Tensor, dict[str, ExpertCounts]]:
        """The stream after the chosen tokens have run (see DepthBlockConfig.scale), and what experts'
        routers count. `dropout`: of the chosen tokens."""
        rows, scale = chosen.tokens.rows, depth.config.scale
        before = x.index_select(0, rows)
        added, attended = [], before
        if depth.config.parts != "feed_forward":
            added.append(self._chosen_attended(x, before, chosen, inputs.routing, rotary, dropout))
            attended = before + added[0]
        fed, experts = self._fed_forward(attended, chosen.tokens.routing, inputs.routing_state, dropout)
        if scale == "all":
            return (gates * x.index_copy(0, rows, attended + fed)).to(x.dtype), experts
        chosen_gates = gates.index_select(0, rows)
        if scale == "all_as_released":
            ran = attended + (chosen_gates * fed).to(x.dtype)
            return (gates * x).to(x.dtype).index_copy(0, rows, ran), experts
        return add_gated(x, rows, chosen_gates, *added, fed), experts

    def _chosen_attended(
        self,
        x: Tensor,
        before: Tensor,
        chosen: Chosen,
        routing: Routing,
        rotary: Rotary,
        dropout: StreamDropout | None,
    ) -> Tensor:
        """What attention adds to the chosen tokens, `before` of `x`."""
        tokens = chosen.tokens
        if not isinstance(tokens.mask, QueryMask):
            rotary = rotary.index_select(0, tokens.rows)
            return self._attended(before, tokens.routing, tokens.mask, rotary, dropout)
        if self.post:
            seen = self.attention.of_queries(before, tokens, x, routing, rotary)
            seen = self.attention_norm(seen, tokens.routing.counts)
        else:
            x = self.attention_norm(x, routing.counts)
            seen = self.attention.of_queries(x.index_select(0, tokens.rows), tokens, x, routing, rotary)
        return seen if dropout is None else dropout(seen, f"{self.name}.attention")
