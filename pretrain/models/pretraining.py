"""What an engine trains: a decoder and its objective, as a sum that is not yet divided."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pretrain.models.cross_entropy import sums_per_modality
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs


class Pretraining(nn.Module):
    """One pipeline stage, or all of the decoder: its last stage gives (objective, stats), both sums over the
    tokens of a micro-batch, the others what the next one continues from and their part of the objective."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, inputs: ModelInputs, hidden: Float[Tensor, "rows d_model"] | None = None
    ) -> (
        tuple[Float[Tensor, ""], Float[Tensor, " stats"]]
        | tuple[Float[Tensor, "rows d_model"], Float[Tensor, ""] | None]
    ):
        """`hidden`: what the stage before gave; None on the first. objective: next-token loss plus z-loss and
        the auxiliary losses of this stage's layers, to differentiate. stats, detached fp32: the loss in nats
        of each modality (without those), then the weight of each modality. A stage before the last gives
        (hidden, its own part of the objective, if it has one)."""
        hidden = self.decoder.hidden(inputs, hidden)
        auxiliary = self.decoder.auxiliary()
        if self.decoder.head is None:
            return hidden, auxiliary
        objective, nll = self.decoder.head(hidden, inputs, objective=True)
        if auxiliary is not None:
            objective = objective + auxiliary
        sums = sums_per_modality(nll, inputs.loss_weights)
        return objective, torch.cat((sums, inputs.loss_weights.sum(dim=1)))
