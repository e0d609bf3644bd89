"""The fixed noise on held-out images, and their losses by how much noise there is.

The noise and the time of an image depend on the number of its text in the evaluation alone, so they are equal
in all runs, steps and layouts, and where one text is read behind different conditions.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch

from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs
from pretrain.models.noising import evaluation_draw
from pretrain.models.vector_inputs import Images, VectorInputs, with_noise

QUARTERS = 4
"""Equal parts of the times from 0 to 1, by which losses of images are told apart."""


def with_fixed_noise(inputs: ModelInputs, model: ModelConfig, texts: Sequence[Sequence[int]]) -> ModelInputs:
    """The inputs of a micro-batch with noise. `texts`: by sequence and document, the number of the text."""

    def noised(modality: str) -> VectorInputs:
        number = model.modalities.index(modality)

        def draw(images: Images, image: int, size: tuple[int, int]) -> tuple[float, np.ndarray]:
            text = texts[int(images.sequence[image])][int(images.document[image])]
            return evaluation_draw(text, number, images.num_before(image), size)

        return with_noise(inputs.vectors[modality], model.vectors[modality], draw)

    return replace(inputs, vectors={**inputs.vectors, **{m: noised(m) for m in model.learned_vectors}})


def time_rows(learned: Iterable[str]) -> dict[str, str]:
    """Name -> modality of the rows that `by_time` adds for modalities of vectors with a loss: "image/time_1"
    for the least noise to "image/time_4"."""
    return {f"{m}/time_{quarter}": m for m in learned for quarter in range(1, QUARTERS + 1)}


def by_time(inputs: ModelInputs, model: ModelConfig) -> ModelInputs:
    """The inputs with `time_rows` as more rows of the statistics, where images count in place of the row of
    their modality."""
    first = len(model.modalities)
    num_rows, vectors = first + len(time_rows(model.learned_vectors)), dict(inputs.vectors)
    for modality in model.learned_vectors:
        of = vectors[modality]
        weights = torch.zeros(num_rows, of.weights.shape[1])
        quarter = (of.times * QUARTERS).long().clamp(max=QUARTERS - 1)  # a time may be rounded to 1
        weights[first + quarter, torch.arange(len(quarter))] = of.weights.sum(dim=0)
        vectors[modality] = replace(of, weights=weights)
        first += QUARTERS
    rows = torch.zeros(num_rows, inputs.loss_weights.shape[1])
    rows[: len(model.modalities)] = inputs.loss_weights
    return replace(inputs, loss_weights=rows, vectors=vectors)
