"""SwiGLU feed-forward with one set of weights per tower, or with several: experts."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.collectives import ONE_RANK, TensorParallel, combine, sum_gradient, whole_rows
from parallel.dispatch import DispatchedLinear, collect, dispatch, grouped
from parallel.logical import LogicalTensor
from parallel.routing import Routing
from parallel.towers import TowerColumnParallelLinear, TowerRowParallelLinear, rows_of_shards
from pretrain.models.config import ModelConfig
from pretrain.models.experts import Choice, Router, assign
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.router_report import ExpertCounts
from pretrain.models.routing_state import RoutingState


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one product."""

    def __init__(
        self, config: ModelConfig, name: str, weights: InitialWeights, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        super().__init__()
        shards: Sequence[str] = config.shards_of("feed_forward")
        d_model, width = config.d_model, config.ffn_width
        self.gate_up = TowerColumnParallelLinear(
            d_model, 2 * width, shards, weights.normal(f"{name}.gate_up"), blocks=(width, width), tp=tp
        )
        self.down = TowerRowParallelLinear(width, d_model, shards, weights.residual(f"{name}.down"), tp=tp)

    def forward(
        self, x: Float[Tensor, "rows d_model"], routing: Routing, _routing_state: RoutingState | None = None
    ) -> tuple[Float[Tensor, "rows d_model"], dict[str, ExpertCounts]]:
        """The result, and no counts: see ExpertFeedForward."""
        return self.down(swiglu(self.gate_up(x, routing.counts)), routing.counts), {}


class ExpertFeedForward(nn.Module):
    """The sum over a token's experts of gate * FeedForward(x), 0 if it has none, in towers with experts; in
    others FeedForward(x). Tensor-parallel ranks exchange what they exchange for FeedForward, whatever the
    number of experts, and the gradients of gates."""

    def __init__(
        self, config: ModelConfig, name: str, weights: InitialWeights, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        super().__init__()
        self.tp, self.shards, d_model = tp, config.shards_of("feed_forward"), config.d_model
        self.experts = [config.experts_of(shard) for shard in self.shards]
        gate_up, down = {}, {}
        for shard, experts in zip(self.shards, self.experts, strict=True):
            width, stacked = config.width_of(shard), (experts.num_experts,) if experts else ()
            dim = len(stacked)
            gate_up[shard] = LogicalTensor((*stacked, 2 * width, d_model), dim, (width, width))
            down[shard] = LogicalTensor((*stacked, d_model, width), dim + 1)
        self.gate_up = DispatchedLinear(gate_up, weights.each(weights.normal, f"{name}.gate_up"), tp=tp)
        self.down = DispatchedLinear(down, weights.each(weights.residual, f"{name}.down"), tp=tp)
        self.router = Router(
            {s: e.num_experts for s, e in zip(self.shards, self.experts, strict=True) if e},
            d_model,
            config.norm_eps,
            weights.normal(f"{name}.router"),
        )
        self.towers, self.block = config.tower_names, name.rpartition(".")[0]

    def forward(
        self, x: Float[Tensor, "rows d_model"], routing: Routing, routing_state: RoutingState | None = None
    ) -> tuple[Float[Tensor, "rows d_model"], dict[str, ExpertCounts]]:
        """The result, and tower -> what its router counts."""
        whole = whole_rows(x, self.tp)
        rows = rows_of_shards(routing.counts, self.shards)
        pieces = whole.split(rows)
        choices = self._choices(pieces, routing, routing_state or RoutingState())
        taken = [choice and choice.assignment for choice in choices]
        # To be summed where ranks compute parts of it: gradients of a token's row, and of its gates.
        inputs = sum_gradient(whole, self.tp).split(rows)
        xs = [x if by is None else dispatch(x, by) for x, by in zip(inputs, taken, strict=True)]
        products = [
            swiglu(h) if choice is None else gated_swiglu(h, sum_gradient(choice.gates, self.tp))
            for h, choice in zip(self.gate_up(xs, taken), choices, strict=True)
        ]
        ys = self.down(products, taken)
        out = torch.cat(
            [y if by is None else collect(y, by, count) for y, by, count in zip(ys, taken, rows, strict=True)]
        )
        counts = {
            tower: choice.counts
            for tower, choice in zip(self.towers, choices, strict=True)
            if choice is not None
        }
        return combine(out, self.tp), counts

    def _choices(
        self, pieces: Sequence[Tensor], routing: Routing, routing_state: RoutingState
    ) -> list[Choice | None]:
        """The choice of each tower's router; None where a tower has no experts."""
        of_towers = list(zip(self.towers, self.experts, pieces, routing.tokens, strict=True))
        logits = iter(
            self.router(
                [
                    piece if tokens.rows is None else piece.index_select(0, tokens.rows)
                    for _, experts, piece, tokens in of_towers
                    if experts is not None
                ]
            )
        )
        choices: list[Choice | None] = []
        for tower, experts, piece, tokens in of_towers:
            if experts is None:
                choices.append(None)
                continue
            thresholds = None
            if routing_state.causal and not experts.causal:
                names = (f"{self.block}.experts.{tower}.{e}" for e in range(experts.num_experts))
                thresholds = [routing_state.thresholds.get(name, -math.inf) for name in names]
            choices.append(
                assign(
                    experts,
                    next(logits),
                    tokens,
                    thresholds=thresholds,
                    counts_on_device=grouped(piece),
                    tp=self.tp,
                )
            )
        return choices


def swiglu(gate_up: Float[Tensor, "tokens twice_width"]) -> Float[Tensor, "tokens width"]:
    """silu(first half) * second half."""
    return _SwiGLU.apply(gate_up)


def gated_swiglu(
    gate_up: Float[Tensor, "rows twice_width"], weights: Float[Tensor, " rows"]
) -> Float[Tensor, "rows width"]:
    """swiglu times the weight of each row. Here and not behind the next product, whose result would have to
    be kept for the weights' gradient."""
    return _GatedSwiGLU.apply(gate_up, weights.to(gate_up.dtype))


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only; autograd would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, F.silu(gate).mul_(grad)), dim=-1)


class _GatedSwiGLU(torch.autograd.Function):
    """As _SwiGLU."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weights.unsqueeze(1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gate_up, weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated = F.silu(gate)
        grad_weights = (activated * up).mul_(grad).sum(dim=1)
        grad = grad * weights.unsqueeze(1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, activated.mul_(grad)), dim=-1), grad_weights
