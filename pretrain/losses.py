"""Losses as sums: who divides, and by what, is decided in one place (the engine), over all ranks and
micro-batches."""

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F


def token_losses(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]
) -> tuple[Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
    """(negative log likelihood in nats, log Z) per token, in fp32."""
    wide = logits.float()
    return F.cross_entropy(wide, targets, reduction="none"), wide.logsumexp(-1)


def sums_per_modality(
    losses: Float[Tensor, " tokens"], weights: Float[Tensor, "modalities tokens"]
) -> Float[Tensor, " modalities"]:
    """Weighted sum of the losses of each modality; `weights` as in ModelInputs.loss_weights."""
    return weights @ losses
