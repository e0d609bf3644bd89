"""SwiGLU feed-forward with one set of weights per tower."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.collectives import ONE_RANK, TensorAxis
from parallel.towers import TowerColumnParallelLinear, TowerRowParallelLinear
from pretrain.models.config import ModelConfig
from pretrain.models.initial_weights import InitialWeights


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one product."""

    def __init__(
        self, config: ModelConfig, name: str, weights: InitialWeights, *, axis: TensorAxis = ONE_RANK
    ) -> None:
        super().__init__()
        shards: Sequence[str] = config.shards_of("feed_forward")
        d_model, width = config.d_model, config.ffn_width
        self.gate_up = TowerColumnParallelLinear(
            d_model, 2 * width, shards, weights.normal(f"{name}.gate_up"), blocks=(width, width), axis=axis
        )
        self.down = TowerRowParallelLinear(
            width, d_model, shards, weights.residual(f"{name}.down"), axis=axis
        )

    def forward(
        self, x: Float[Tensor, "rows d_model"], counts: tuple[int, ...]
    ) -> Float[Tensor, "rows d_model"]:
        return self.down(swiglu(self.gate_up(x, counts)), counts)


def swiglu(gate_up: Float[Tensor, "tokens twice_width"]) -> Float[Tensor, "tokens width"]:
    """silu(first half) * second half."""
    return _SwiGLU.apply(gate_up)


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
