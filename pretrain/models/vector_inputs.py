"""The vectors of a micro-batch: where they are, which images they make up, and the noise on them.

An image is what stands between an opening and a closing delimiter. It has one time, and one share in the
loss: the mean squared error over all its numbers. An image counts if the slot of its opening delimiter has a
loss weight. One that does not is context: it has time 0 and no noise.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from data_pipeline.shards.vocabulary import VectorFormat
from data_pipeline.stream.batch import Batch
from pretrain.models.noising import levels, noised, target, time_at
from pretrain.models.vectors_config import VectorsConfig

Draw = Callable[["Images", int, tuple[int, int]], tuple[float, np.ndarray]]
"""Says (quantile of the time, eps [vectors, features]) of an image, from the table of images, its number in
it and (its vectors, their features)."""


@dataclass(frozen=True)
class Images:
    """The images of one modality in a micro-batch, by sequence and in it by position. On the host."""

    sequence: Int[np.ndarray, " images"]
    """Number of the sequence in the micro-batch."""
    position: Int[np.ndarray, " images"]
    """Slot of the first vector in the sequence."""
    size: Int[np.ndarray, " images"]
    """Vectors."""
    document: Int[np.ndarray, " images"]
    """Number of the document in the sequence."""
    counts: Bool[np.ndarray, " images"]
    """Whether the image has a loss."""
    is_condition: Bool[np.ndarray, " images"]
    """Whether tokens of other modalities follow it in its document; special tokens do not count."""

    def num_before(self, image: int) -> int:
        """How many images of its document come before image number `image`."""
        same = (self.sequence == self.sequence[image]) & (self.document == self.document[image])
        return int(same[:image].sum())

    def spans(self, sequence_tokens: int) -> list[tuple[int, int]]:
        """(first slot, slot behind the last) of every image, over all sequences."""
        first = self.sequence * sequence_tokens + self.position
        return list(zip(first.tolist(), (first + self.size).tolist(), strict=True))


@dataclass(frozen=True)
class VectorInputs:
    """The V vectors of one modality in a micro-batch, in the order of the sorted stream."""

    values: Float[Tensor, "vectors features"]
    """float32, normalised; with noise once it is drawn."""
    rows: Int[Tensor, " vectors"]
    """int64, ascending: their rows in the sorted stream."""
    host_rows: Int[np.ndarray, " vectors"]
    """`rows` on the host."""
    image_of: Int[Tensor, " vectors"]
    """int64, ascending: number of each vector's image."""
    sizes: Float[Tensor, " images"]
    """float32: vectors of each image."""
    weights: Float[Tensor, "rows images"]
    """float32: an image's weight in one row of the statistics, 0 in the others, as ModelInputs.loss_weights
    is of tokens."""
    images: Images
    num_slots: int
    """Slots whose loss weight the batch sets, and that predict nothing by next token."""
    times: Float[Tensor, " images"]
    """float32: 0 until noise is drawn."""
    target: Float[Tensor, "vectors features"] | None = None
    """float32: what is to be predicted; None until noise is drawn."""
    scale: float = 1.0
    """Factor on an image's loss in the objective (pretrain/train/vector_steps.py)."""

    @property
    def num_images(self) -> int:
        """Images that count."""
        return int(self.images.counts.sum())

    def to(self, move: Callable[[Tensor], Tensor]) -> "VectorInputs":
        """The same with every tensor moved."""
        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)


def vector_inputs(
    batch: Batch,
    modality: str,
    number: int,
    to_sequence: Int[np.ndarray, " tokens"],
    config: VectorsConfig,
    form: VectorFormat | None,
    num_rows: int,
) -> VectorInputs:
    """The clean vectors of modality number `number` in a batch. `to_sequence`: as of Routing. `form`: how the
    batch stores them; None is enough where it has none. `num_rows`: of the statistics."""
    images = images_of(batch, number)
    places = (batch.input_modality == number).reshape(-1)
    stored = batch.vectors[modality].values if modality in batch.vectors else np.zeros((0, config.features))
    assert len(stored) == places.sum(), f"{len(stored)} vectors of {modality} for {places.sum()} places"
    if len(stored):
        assert form is not None and form.features == config.features, (modality, form, config.features)
        stored = form.normalised(stored)
    rows = to_sequence[places]
    weights = np.zeros((num_rows, len(images.size)), np.float32)
    weights[number] = images.counts
    unpredicted = (batch.input_modality == number) | (batch.target_modality == number)
    return VectorInputs(
        values=torch.from_numpy(stored.astype(np.float32)),
        rows=torch.from_numpy(rows),
        host_rows=rows,
        image_of=torch.from_numpy(np.repeat(np.arange(len(images.size)), images.size)),
        sizes=torch.from_numpy(images.size.astype(np.float32)),
        weights=torch.from_numpy(weights),
        images=images,
        num_slots=int((batch.loss_weights[unpredicted] > 0).sum()),
        times=torch.zeros(len(images.size)),
    )


def images_of(batch: Batch, number: int) -> Images:
    """The images of modality number `number` in a batch."""
    tokens = batch.sequence_tokens
    # Numbers ascend over all sequences; padding comes behind the documents of its sequence.
    documents = np.where(batch.document_ids < 0, tokens, batch.document_ids)
    documents = (documents + (tokens + 1) * np.arange(batch.num_sequences)[:, None]).reshape(-1)
    inside = (batch.input_modality == number).reshape(-1)
    is_first = inside.copy()
    is_first[1:] &= ~(inside[:-1] & (documents[1:] == documents[:-1]))
    (first,) = np.nonzero(is_first)
    vectors = np.concatenate(([0], np.cumsum(inside)))
    # A span is never cut, so its opening delimiter is an input of the same document.
    assert (documents[first] == documents[first - 1]).all(), f"vectors that nothing opens: {batch.samples}"
    others = ~batch.input_special.reshape(-1) & (batch.document_ids.reshape(-1) >= 0) & ~inside
    others_before = np.concatenate(([0], np.cumsum(others)))
    ends = np.searchsorted(documents, documents[first], side="right")
    return Images(
        sequence=first // tokens,
        position=first % tokens,
        size=np.diff(np.append(vectors[first], vectors[-1])),
        document=batch.document_ids.reshape(-1)[first].astype(np.int64),
        counts=batch.loss_weights.reshape(-1)[first - 1] > 0,
        is_condition=others_before[ends] > others_before[first],
    )


def with_noise(vectors: VectorInputs, config: VectorsConfig, draw: Draw) -> VectorInputs:
    """The vectors with the noise that `draw` says on every image that counts, and what is to be predicted.
    `vectors` are clean and on the host."""
    assert config.objective != "none" and vectors.target is None
    images, features = vectors.images, config.features
    times = np.zeros(len(images.size))
    eps = np.zeros(tuple(vectors.values.shape), np.float32)
    ends = np.cumsum(images.size)
    for image in np.flatnonzero(images.counts).tolist():
        size = int(images.size[image])
        quantile, eps[ends[image] - size : ends[image]] = draw(images, image, (size, features))
        most = config.condition_max_time if images.is_condition[image] else None
        times[image] = time_at(quantile, config.times, config.shift, most or 1.0)
    counted = np.repeat(images.counts, images.size)[:, None]
    at = levels(config.objective, np.repeat(times, images.size)[:, None])
    clean, of = vectors.values.numpy(), target(config.predicted, at)
    goal = of.of_eps * eps + of.of_clean * clean
    return replace(
        vectors,
        values=torch.from_numpy(np.where(counted, noised(at, clean, eps), clean).astype(np.float32)),
        target=torch.from_numpy(np.broadcast_to(goal, clean.shape).astype(np.float32)),
        times=torch.from_numpy(times.astype(np.float32)),
    )
