"""The statistics vector of a step: loss and weight of each modality's targets. Engines sum it unread."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TargetSums(NamedTuple):
    """Sums over the targets of one modality."""

    nats: float
    """Next-token loss times loss weight; z-loss and auxiliary losses are left out."""
    weight: float
    """Loss weights: the number of targets where each counts 1."""


def pack(
    nats: "Float[Tensor, ' modalities']", weights: "Float[Tensor, ' modalities']"
) -> "Float[Tensor, ' stats']":
    """The statistics vector of the two sums, each in the config's order of modalities."""
    import torch

    return torch.cat((nats, weights))


def unpack(stats: Sequence[float], modalities: Sequence[str]) -> dict[str, TargetSums]:
    """Modality -> its sums, from a statistics vector or a sum of several."""
    count = len(modalities)
    return {
        modality: TargetSums(nats, weight)
        for modality, nats, weight in zip(modalities, stats[:count], stats[count:], strict=True)
    }
