"""Micro-batches of a training step with images as vectors, for comparisons of layouts."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.train.vector_steps import image_scales, with_drawn_noise
from tests.pretrain.models.vector_batch import FORMAT, PACKED, Document, vector_batch

IMAGE_WEIGHT = 5.0
_ONLY_IMAGES: Sequence[Document] = (("i3",), ("i2", "i4"))
STEPS: Sequence[Sequence[Sequence[Document]]] = (
    [*PACKED, *PACKED[::-1]],
    [_ONLY_IMAGES] * 4,
    [((9, "s2"),), ((5,), (4,)), PACKED[1], PACKED[0]],
)
"""Documents of the 4 micro-batches of a step, in turn: all; nothing but images; no image on the first of two
data-parallel ranks, which takes the first two."""


def image_micro_batches(config: ModelConfig, step: int, seed: int, dtype: torch.dtype) -> list[ModelInputs]:
    """Micro-batches of one sequence. `dtype`: that in which losses are summed."""
    inputs = [
        build_inputs(
            vector_batch([documents], seed=seed + 10 * step + number), config, formats={"image": FORMAT}
        )
        for number, documents in enumerate(STEPS[step % len(STEPS)])
    ]
    images = sum(each.vectors["image"].num_images for each in inputs)
    scales = image_scales({"image": IMAGE_WEIGHT}, sum(each.weight for each in inputs), [images])
    return [
        replace(
            with_drawn_noise(each, config, seed, step, (number,), scales),
            loss_weights=each.loss_weights.to(dtype),
        )
        for number, each in enumerate(inputs)
    ]
