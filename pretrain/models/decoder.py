"""The decoder: one list of layers for dense and sparse models alike."""

from jaxtyping import Float
from torch import Tensor, nn

from parallel.towers import SharedEmbedding, TowerColumnParallelLinear, TowerNorm
from pretrain.losses import linear_cross_entropy
from pretrain.models.block import Block
from pretrain.models.config import SHARED_TOWER, ModelConfig
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.inputs import ModelInputs
from pretrain.models.query_key import rotary_table


class Head(TowerColumnParallelLinear):
    """Logits, or the objective without ever holding the logits of all tokens; shared by all towers."""

    def __init__(self, config: ModelConfig, name: str, weights: InitialWeights) -> None:
        super().__init__(config.d_model, config.vocab_tokens, (SHARED_TOWER,), weights.normal(name))
        self.z_loss = config.z_loss

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "tokens d_model"], inputs: ModelInputs, *, objective: bool = False
    ) -> Float[Tensor, "tokens vocab"] | tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
        """Logits; with `objective`, (objective summed over tokens, negative log likelihood of each token)."""
        if not objective:
            return super().forward(hidden, inputs.routing.counts)
        return linear_cross_entropy(
            hidden, self.weight[SHARED_TOWER], inputs.target_ids, inputs.loss_weights.sum(dim=0), self.z_loss
        )


class Decoder(nn.Module):
    """embedding -> blocks -> final norm -> head. The weights depend on (config, seed) alone.

    A parameter's name ends with its tower, or "shared": `blocks.0.attention.qkv.weight.image`.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 1, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.config = config
        weights = InitialWeights.of(config, seed)
        self.embedding = SharedEmbedding(
            config.vocab_tokens, config.d_model, SHARED_TOWER, weights.normal("embedding")
        )
        self.blocks = nn.ModuleList(
            Block(config, f"blocks.{index}", weights, activation_checkpointing=activation_checkpointing)
            for index in range(config.num_layers)
        )
        self.final_norm = TowerNorm(config.d_model, config.shards_of("norm"), config.norm_eps)
        self.head = Head(config, "head", weights)

    def forward(self, inputs: ModelInputs) -> Float[Tensor, "tokens vocab"]:
        """Logits in sorted order."""
        return self.head(self.hidden(inputs), inputs)

    def hidden(self, inputs: ModelInputs) -> Float[Tensor, "tokens d_model"]:
        """What the head multiplies, in sorted order."""
        rotary = rotary_table(inputs.positions, self.config.head_dim, self.config.rope_theta)
        x = self.embedding(inputs.input_ids)
        for block in self.blocks:
            x = block(x, inputs.routing, inputs.mask, rotary)
        return self.final_norm(x, inputs.routing.counts)
