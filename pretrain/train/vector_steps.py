"""The noise on images of a training step, and the share of their loss in the step's objective.

The objective of a step is a sum of means over the global batch: the loss per predicted id, and for every
modality of vectors its loss weight times the loss per image (Transfusion, arXiv 2408.11039, Eq. 4). The
engine divides all by the weight N of predicted ids, so a sum over images is multiplied by N / their number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from parallel.world import World
from pretrain.config import RunConfig
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs
from pretrain.models.noising import training_draw
from pretrain.models.vector_inputs import Images, with_noise


def with_images(
    config: RunConfig,
    inputs: Sequence[ModelInputs],
    sequences: Sequence[Sequence[int]],
    step: int,
    world: World,
) -> list[ModelInputs]:
    """The inputs of this rank's micro-batches in the step that `step` others came before, with noise on their
    images and the scale of their loss. `sequences`: the numbers of their sequences in the global batch. All
    ranks call it.

    A step that predicts no id divides by its number of images.
    """
    learned = config.model.learned_vectors
    if not learned:
        return list(inputs)
    mine = [[each.weight, *(each.vectors[m].num_images for m in learned)] for each in inputs]
    weight, *images = world.sum_over_dp([sum(column) for column in zip(*mine, strict=True)])
    scales = image_scales(config.image_weights, weight or sum(images), images)
    noised = [
        with_drawn_noise(each, config.model, config.seed, step, numbers, scales)
        for each, numbers in zip(inputs, sequences, strict=True)
    ]
    if weight:
        return noised
    counts = (sum(each.vectors[m].num_images for m in learned) for each in noised)
    return [replace(each, images_weight=float(n)) for each, n in zip(noised, counts, strict=True)]


def image_scales(weights: Mapping[str, float], divisor: float, images: Sequence[float]) -> dict[str, float]:
    """Modality -> factor on the sum of its images' losses, which makes it a weighted mean once the objective
    is divided by `divisor`. `images`: numbers of images, in the order of `weights`; 0 where there is none."""
    pairs = zip(weights.items(), images, strict=True)
    return {modality: weight * divisor / n if n else 0.0 for (modality, weight), n in pairs}


def with_drawn_noise(
    inputs: ModelInputs,
    model: ModelConfig,
    seed: int,
    step: int,
    sequences: Sequence[int],
    scales: Mapping[str, float],
) -> ModelInputs:
    """The inputs of a micro-batch with noise that depends on (seed, step, number of the sequence in the
    global batch, place of the image in it) alone. `scales`: as of image_scales."""

    def draw(images: Images, image: int, size: tuple[int, int]) -> tuple[float, np.ndarray]:
        sequence = sequences[int(images.sequence[image])]
        return training_draw(seed, step, sequence, int(images.position[image]), size)

    noised = {
        m: replace(with_noise(inputs.vectors[m], model.vectors[m], draw), scale=scale)
        for m, scale in scales.items()
    }
    return replace(inputs, vectors={**inputs.vectors, **noised})
