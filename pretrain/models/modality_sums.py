"""The statistics vector of a step: loss and weight of each modality's targets. Engines sum it unread."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor


class TargetSums(NamedTuple):
    """Sums over the targets of one modality; of a modality of vectors, over its images."""

    nats: float
    """Next-token loss times loss weight; z-loss and auxiliary losses are left out. Of vectors the mean
    squared error of an image."""
    weight: float
    """Loss weights: the number of targets where each counts 1. Of vectors the number of images."""


def objective(
    sums: Mapping[str, tuple[float, float]],
    image_weights: Mapping[str, float],
    id_weights: Mapping[str, float] | None = None,
) -> float | None:
    """The mean loss of ids plus the weighted mean losses of images; None without a target.

    `sums`: modality -> (sum of losses, weight). `image_weights`: modality of vectors -> factor on its mean.
    `id_weights`: modality of ids -> factor on its targets in their mean; None: 1 for all."""
    ids = {m: (id_weights or {}).get(m, 1.0) for m in sums if m not in image_weights}
    count = sum(factor * sums[m][1] for m, factor in ids.items())
    means = [sum(factor * sums[m][0] for m, factor in ids.items()) / count] if count else []
    means += [factor * sums[m][0] / sums[m][1] for m, factor in image_weights.items() if sums[m][1]]
    return sum(means[1:], means[0]) if means else None


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
