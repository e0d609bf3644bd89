"""SwiGLU feed-forward with one set of weights per tower."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.towers import TowerColumnParallelLinear, TowerRowParallelLinear
from pretrain.models.config import ModelConfig
from pretrain.models.initial_weights import InitialWeights


class FeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one product."""

    def __init__(self, config: ModelConfig, name: str, weights: InitialWeights) -> None:
        super().__init__()
        shards: Sequence[str] = config.shards_of("feed_forward")
        d_model, width = config.d_model, config.ffn_width
        self.gate_up = TowerColumnParallelLinear(
            d_model, 2 * width, shards, weights.normal(f"{name}.gate_up"), stride=2
        )
        self.down = TowerRowParallelLinear(width, d_model, shards, weights.residual(f"{name}.down"))

    def forward(
        self, x: Float[Tensor, "tokens d_model"], counts: tuple[int, ...]
    ) -> Float[Tensor, "tokens d_model"]:
        gate, up = self.gate_up(x, counts).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up, counts)
