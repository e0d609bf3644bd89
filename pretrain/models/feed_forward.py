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
from pretrain.models.experts import Choice, Router, choose
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.routing_state import RoutingState, ScoreCounts


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
        self, x: Float[Tensor, "rows d_model"], routing: Routing, _selection: RoutingState | None = None
    ) -> Float[Tensor, "rows d_model"]:
        return self.down(swiglu(self.gate_up(x, routing.counts)), routing.counts)


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
        self.auxiliary: Tensor | None = None
        """Auxiliary losses of the last forward pass, a sum over its tokens; to be added to its objective."""
        block = name.rpartition(".")[0]
        self.places = [
            [
                ScoreCounts(f"{block}.experts.{tower}.{e}")
                for e in range(experts.num_experts if experts else 0)
            ]
            for tower, experts in zip(config.tower_names, self.experts, strict=True)
        ]
        """Of each tower's experts: scores, and the sums of pretrain/train/expert_steps.py."""
        self.score_counts = [place for of_tower in self.places for place in of_tower]

    def forward(
        self, x: Float[Tensor, "rows d_model"], routing: Routing, routing_state: RoutingState | None = None
    ) -> Float[Tensor, "rows d_model"]:
        whole = whole_rows(x, self.tp)
        rows = rows_of_shards(routing.counts, self.shards)
        pieces = whole.split(rows)
        choices = self._choices(pieces, routing, routing_state or RoutingState())
        taken = [choice and choice.taken for choice in choices]
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
        return combine(out, self.tp)

    def _choices(
        self, pieces: Sequence[Tensor], routing: Routing, routing_state: RoutingState
    ) -> list[Choice | None]:
        """Of each tower; None where there are no experts."""
        of_towers = list(zip(self.experts, pieces, routing.tokens, self.places, strict=True))
        logits = iter(
            self.router(
                [
                    piece if tokens.rows is None else piece.index_select(0, tokens.rows)
                    for experts, piece, tokens, _ in of_towers
                    if experts is not None
                ]
            )
        )
        choices, auxiliary = [], []
        for experts, piece, tokens, places in of_towers:
            if experts is None:
                choices.append(None)
                continue
            thresholds = None
            if routing_state.causal and not experts.causal:
                thresholds = [routing_state.thresholds.get(place.name, -math.inf) for place in places]
            choice = choose(
                experts,
                next(logits),
                tokens,
                thresholds=thresholds,
                counts_on_device=grouped(piece),
                tp=self.tp,
            )
            choices.append(choice)
            balance, z = choice.auxiliary
            auxiliary.append(experts.load_balance * balance + experts.router_z * z)
            if self.training:
                _count(places, choice, causal=experts.causal)
        self.auxiliary = torch.stack(auxiliary).sum()
        return choices


def _count(places: Sequence[ScoreCounts], choice: Choice, *, causal: bool) -> None:
    """In the order of pretrain.train.expert_steps; scores only where a threshold is made of them."""
    tokens = choice.scores.shape[0]
    of_all = (tokens, choice.load[-1], *choice.auxiliary)
    for expert, place in enumerate(places):
        scores = choice.scores[: 0 if causal else tokens, expert]
        place.add(scores, choice.load[expert], *(of_all if expert == 0 else ()))


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
