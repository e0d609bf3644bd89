"""The decoder: one list of layers for dense and sparse models alike."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from parallel.collectives import ONE_RANK, TensorParallel
from parallel.towers import TowerColumnParallelLinear, TowerEmbedding, TowerNorm, rows_of_shards
from pretrain.models.block import SUBLAYERS, Block, Sublayer
from pretrain.models.config import ModelConfig
from pretrain.models.cross_entropy import linear_cross_entropy
from pretrain.models.depth import DepthRouting
from pretrain.models.dropout import StreamDropout
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.inputs import ModelInputs
from pretrain.models.query_key import rotary_table
from pretrain.models.router_report import BlockReport, RouterReport
from pretrain.models.vectors import VectorAdapters


class Head(TowerColumnParallelLinear):
    """Logits, or the objective without ever holding the logits of all tokens. A token's logits are over all
    ids, whatever its tower."""

    def __init__(
        self,
        config: ModelConfig,
        name: str,
        weights: InitialWeights,
        *,
        tied: TowerEmbedding | None = None,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        """`tied`: the embedding whose weights the head has; None: it has its own."""
        super().__init__(
            config.d_model,
            config.vocab_tokens,
            config.shards_of("head"),
            weights.normal(name),
            weight=None if tied is None else tied.weight,
            tp=tp,
        )
        self.z_loss, self.width_ratio = config.z_loss, config.width_ratio

    def forward(  # type: ignore[override]
        self, hidden: Float[Tensor, "rows d_model"], inputs: ModelInputs, *, objective: bool = False
    ) -> Float[Tensor, "tokens vocab_local"] | tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
        """Logits of this rank's part of the vocabulary; with `objective`, (objective summed over tokens,
        negative log likelihood of each token), equal on all tensor-parallel ranks."""
        if self.width_ratio != 1:
            hidden = hidden / self.width_ratio
        if not objective:
            return super().forward(hidden, inputs.routing.counts)
        return linear_cross_entropy(
            hidden,
            [self.weight[name] for name in self.shards],
            rows_of_shards(inputs.routing.counts, self.shards),
            inputs.target_ids,
            inputs.target_weights,
            self.z_loss,
            tp=self.tp,
        )


class Decoder(nn.Module):
    """embedding -> blocks -> final norm -> head, or a range of them. The weights depend on (config, seed)
    alone.

    A parameter's name ends with its tower, or "shared": `blocks.0.attention.qkv.weight.image`. It is the same
    on whatever stage the layer is.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        seed: int = 1,
        tp: TensorParallel = ONE_RANK,
        activation_checkpointing: bool = False,
        sublayers: range | None = None,
    ) -> None:
        """`sublayers`: what this pipeline stage holds of the 2 num_layers + 2, counted as embedding,
        attention and feed-forward of each block in turn, final norm with head. None: all of them."""
        super().__init__()
        self.config = config
        last = 2 * config.num_layers + 1
        held = sublayers if sublayers is not None else range(last + 1)
        weights = InitialWeights.of(config, seed)
        self.embedding: TowerEmbedding | None = None
        self.final_norm: TowerNorm | None = None
        self.head: Head | None = None
        if 0 in held:
            self.embedding = TowerEmbedding(
                config.vocab_tokens,
                config.d_model,
                config.shards_of("embedding"),
                weights.normal("embedding"),
                tp=tp,
            )
        self.blocks = nn.ModuleList()
        for index in range(config.num_layers):
            mine: tuple[Sublayer, ...] = tuple(
                kind for number, kind in enumerate(SUBLAYERS, 2 * index + 1) if number in held
            )
            if not mine:  # of another stage: the list keeps its index for the names
                self.blocks.append(nn.Identity())
                continue
            self.blocks.append(
                Block(
                    config,
                    f"blocks.{index}",
                    weights,
                    tp=tp,
                    activation_checkpointing=activation_checkpointing,
                    sublayers=mine,
                    depth=DepthRouting(config, index, weights, tp=tp) if config.depth_ratios(index) else None,
                )
            )
        if last in held:
            self.final_norm = TowerNorm(
                config.d_model, config.shards_of("final_norm"), config.norm_eps, kind=config.norm, tp=tp
            )
            tied = self.embedding if config.tied_embeddings else None
            assert tied is not None or not config.tied_embeddings, "parallel/layout.py refuses such stages"
            self.head = Head(config, "head", weights, tied=tied, tp=tp)
        self.vectors = _adapters(config, weights, tp, enters=0 in held, leaves=last in held)

    def forward(self, inputs: ModelInputs) -> Float[Tensor, "tokens vocab_local"]:
        """Logits in sorted order, of a decoder with all layers."""
        assert self.head is not None
        hidden, _ = self.hidden(inputs)
        return self.head(hidden, inputs)

    def hidden(
        self, inputs: ModelInputs, x: Float[Tensor, "rows d_model"] | None = None
    ) -> tuple[Float[Tensor, "rows d_model"], RouterReport]:
        """Hidden states before the head, in sorted order: all rows, or this rank's chunk with sequence
        parallel. And what the routers of this stage's layers report.

        `x`: hidden states of the stage before; None where this stage has the embedding.
        """
        stream = x if self.embedding is None else self.embedding(inputs.input_ids, inputs.routing.counts)
        assert stream is not None, "a stage without the embedding continues from the one before"
        if self.embedding is not None:
            for modality, adapters in self.vectors.items():
                assert isinstance(adapters, VectorAdapters)
                stream = adapters.add_to(stream, inputs.vectors[modality])
        config, angles = self.config, torch.promote_types(stream.dtype, torch.float32)
        rotary = rotary_table(
            inputs.positions, config.head_dim, config.rope_theta, angles, config.rope_scaling
        )
        dropout = self._dropout(inputs)
        if dropout is not None and self.embedding is not None and config.embedding_dropout:
            of_embedding = replace(dropout.of_chunk(self.embedding.tp), rate=config.embedding_dropout)
            stream = of_embedding(stream, "embedding")
        layers: dict[int, BlockReport] = {}
        for index, block in enumerate(self.blocks):
            if isinstance(block, Block):
                of_block = dropout if config.dropout else None
                stream, layers[index] = block(stream, inputs.routing, inputs.mask, rotary, inputs, of_block)
        hidden = stream if self.final_norm is None else self.final_norm(stream, inputs.routing.counts)
        return hidden, RouterReport(layers)

    def _dropout(self, inputs: ModelInputs) -> StreamDropout | None:
        """Dropout for the whole sorted stream, at the rate of sublayers; None: nothing is dropped."""
        if not (self.training and self.config.has_dropout):
            return None
        assert inputs.dropout is not None, "inputs of a training step do not say which masks they draw"
        numbers = inputs.dropout.numbers(inputs.routing.to_sorted, self.config.context_tokens)
        return StreamDropout(self.config.dropout, inputs.dropout, numbers)


def _adapters(
    config: ModelConfig, weights: InitialWeights, tp: TensorParallel, **ends: bool
) -> nn.ModuleDict:
    """The adapters of modalities of vectors that a stage holds. `ends`: `enters` and `leaves`."""
    there = config.vectors if any(ends.values()) else ()
    return nn.ModuleDict({m: VectorAdapters(config, m, weights, tp=tp, **ends) for m in there})
