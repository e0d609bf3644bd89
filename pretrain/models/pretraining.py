"""What an engine trains: a decoder and its objective, as a sum that is not yet divided."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.models import modality_sums
from pretrain.models.cross_entropy import sums_per_modality
from pretrain.models.decoder import Decoder
from pretrain.models.experts_config import ExpertsConfig
from pretrain.models.inputs import ModelInputs
from pretrain.models.router_report import RouterReport
from pretrain.models.vectors import VectorAdapters


class Pretraining(nn.Module):
    """One pipeline stage, or the whole decoder, with its part of the objective. Its results are sums over the
    tokens of a micro-batch."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs: ModelInputs, hidden: Float[Tensor, "rows d_model"] | None = None
    ) -> (
        tuple[Float[Tensor, ""], Float[Tensor, " stats"], RouterReport]
        | tuple[Float[Tensor, "rows d_model"], Float[Tensor, ""] | None, RouterReport]
    ):
        """(objective, stats, report) of the last stage; (hidden, part of the objective, report) of a stage
        before it, where the part is None without experts.

        `hidden`: hidden states of the stage before; None on the first. objective: next-token loss plus
        z-loss, weighted by modality, the losses of images, and the auxiliary losses of this stage's layers,
        to differentiate.
        stats: fp32 without gradient, without the weights of modalities, see pretrain/models/modality_sums.py.
        report: that of this stage's routers, without gradient."""
        hidden, report = self.decoder.hidden(inputs, hidden)
        auxiliary = auxiliary_loss(self.decoder.config.experts, report)
        report = report.detach()
        if self.decoder.head is None:
            return hidden, auxiliary, report
        objective, nll = self.decoder.head(hidden, inputs, objective=True)
        if auxiliary is not None:
            objective = objective + auxiliary
        nats, weights = sums_per_modality(nll, inputs.loss_weights), inputs.loss_weights.sum(dim=1)
        for modality in self.decoder.config.learned_vectors:
            adapters, vectors = self.decoder.vectors[modality], inputs.vectors[modality]
            assert isinstance(adapters, VectorAdapters)
            errors = vectors.weights * adapters.errors(hidden, vectors)
            objective = objective + vectors.scale * errors.sum()
            nats = nats + errors.detach().sum(dim=1)
            weights = weights + vectors.weights.sum(dim=1)
        return objective, modality_sums.pack(nats, weights), report


def auxiliary_loss(experts: Mapping[str, ExpertsConfig], report: RouterReport) -> Float[Tensor, ""] | None:
    """Weighted auxiliary losses, summed over the tokens of a report; None where no layer has experts.
    `experts`: tower -> its experts."""
    of_layers = [
        torch.stack(
            [
                experts[tower].load_balance * counts.load_balance + experts[tower].router_z * counts.router_z
                for tower, counts in block.experts.items()
            ]
        ).sum()
        for block in report.layers.values()
        if block.experts
    ]
    return torch.stack(of_layers).sum() if of_layers else None
