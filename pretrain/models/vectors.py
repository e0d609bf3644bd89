"""How the vectors of a modality enter the stream of tokens, and how what the decoder predicts of them leaves.

Adapters are small, so every tensor-parallel rank holds them whole and computes them for all vectors of its
micro-batch. With sequence parallel a rank adds to, and reads from, its own chunk of the stream alone.
"""

import math
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.collectives import ONE_RANK, TensorParallel, combine, sum_gradient
from parallel.towers import Initialise
from pretrain.models.config import ModelConfig
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.vector_inputs import VectorInputs
from pretrain.models.vectors_config import MAX_PERIOD, TIME_FEATURES


class WholeLinear(nn.Module):
    """x @ weight.T + bias, where every tensor-parallel rank holds the whole of both. Biases start at zero."""

    def __init__(self, in_features: int, out_features: int, shard: str, initialise: Initialise) -> None:
        super().__init__()
        weight = torch.empty(out_features, in_features)
        initialise(weight, shard)
        self.shard = shard
        self.weight = nn.ParameterDict({shard: nn.Parameter(weight)})
        self.bias = nn.ParameterDict({shard: nn.Parameter(torch.zeros(out_features))})

    def forward(self, x: Float[Tensor, "rows in"]) -> Float[Tensor, "rows out"]:
        weight = self.weight[self.shard]
        return F.linear(x.to(weight.dtype), weight, self.bias[self.shard])


class VectorAdapters(nn.Module):
    """The adapters of one modality, as far as a pipeline stage holds them: into the stream where it holds the
    embedding, out of it where it holds the head."""

    def __init__(
        self,
        config: ModelConfig,
        modality: str,
        weights: InitialWeights,
        *,
        enters: bool,
        leaves: bool,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        super().__init__()
        own, shard, name = config.vectors[modality], config.vectors_shard(modality), f"vectors.{modality}"
        self.tp, self.width_ratio = tp, config.width_ratio
        self.enter: WholeLinear | None = None
        self.time_hidden: WholeLinear | None = None
        self.time: WholeLinear | None = None
        self.leave: WholeLinear | None = None

        def linear(layer: str, in_features: int, out_features: int) -> WholeLinear:
            return WholeLinear(in_features, out_features, shard, weights.adapter(f"{name}.{layer}"))

        if enters:
            self.enter = linear("enter", own.features, config.d_model)
        if enters and own.learns:
            self.time_hidden = linear("time_hidden", TIME_FEATURES, TIME_FEATURES)
            self.time = linear("time", TIME_FEATURES, config.d_model)
        if leaves and own.learns:
            self.leave = linear("leave", config.d_model, own.features)

    def add_to(self, stream: Float[Tensor, "rows d_model"], vectors: VectorInputs) -> Tensor:
        """The stream with every vector, and the time of its image, added to the row of its id."""
        assert self.enter is not None
        added = self.enter(vectors.values)
        if self.time_hidden is not None and self.time is not None:
            of_images = self.time(F.silu(self.time_hidden(time_waves(vectors.times))))
            # A lookup, whose gradient torch sums in one order on every device.
            added = added + F.embedding(vectors.image_of, of_images)
        if self.tp.sequence_parallel:
            added = sum_gradient(added, self.tp)
        own, rows = self._own(stream, vectors)
        return stream.index_add(0, rows, added[own].to(stream.dtype))

    def errors(
        self, hidden: Float[Tensor, "rows d_model"], vectors: VectorInputs
    ) -> Float[Tensor, " images"]:
        """The mean squared error of every image, in fp32 or wider, equal on all tensor-parallel ranks."""
        assert vectors.target is not None, "noise was not drawn for these images"
        predicted = self.predict(hidden, vectors)
        wide = torch.promote_types(predicted.dtype, torch.float32)
        of_vectors = (predicted.to(wide) - vectors.target.to(wide)).square().mean(dim=1)
        inside = vectors.image_of == torch.arange(len(vectors.sizes), device=predicted.device)[:, None]
        return (inside * of_vectors).sum(dim=1) / vectors.sizes.to(wide)

    def predict(
        self, hidden: Float[Tensor, "rows d_model"], vectors: VectorInputs
    ) -> Float[Tensor, "vectors features"]:
        """What the decoder predicts at every vector. `hidden`: after the final norm."""
        assert self.leave is not None
        own, rows = self._own(hidden, vectors)
        hidden = hidden.index_select(0, rows)
        if self.tp.sequence_parallel:
            whole = F.pad(hidden, (0, 0, own.start, len(vectors.host_rows) - own.stop))
            hidden = combine(whole, replace(self.tp, sequence_parallel=False))
        return self.leave(hidden / self.width_ratio if self.width_ratio != 1 else hidden)

    def _own(self, stream: Tensor, vectors: VectorInputs) -> tuple[slice, Tensor]:
        """(which vectors lie in this rank's chunk of the stream, their rows in it)."""
        if not self.tp.sequence_parallel:
            return slice(None), vectors.rows
        first = self.tp.rank * stream.shape[0]
        start, stop = vectors.host_rows.searchsorted([first, first + stream.shape[0]]).tolist()
        return slice(start, stop), vectors.rows[start:stop] - first


def time_waves(times: Float[Tensor, " images"]) -> Float[Tensor, "images waves"]:
    """Cosines and sines of 1000 times, with periods from 2 pi to 2 pi MAX_PERIOD (DiT); fp64."""
    half = TIME_FEATURES // 2
    exponents = torch.arange(half, device=times.device, dtype=torch.float64) / half
    angles = 1000 * times.double()[:, None] * torch.exp(-math.log(MAX_PERIOD) * exponents)
    return torch.cat((angles.cos(), angles.sin()), dim=1)
