"""Where the vectors of a batch are, which images count, and the noise on them."""

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from pretrain.models.inputs import build_inputs
from pretrain.models.vector_inputs import images_of, with_noise
from tests.pretrain.models.random_batch import DENSE, MOT
from tests.pretrain.models.vector_batch import (
    FORMAT,
    PACKED,
    VOCABULARY,
    draw_of,
    vector_batch,
    vector_config,
    vector_inputs_of,
)


def without_first_image(ids: np.ndarray) -> np.ndarray:
    """Targets of a document of which the first image is context."""
    opening = VOCABULARY.delimiters("image")[0]
    first = int(np.argmax(ids == opening)) if (ids == opening).any() else -1
    return np.arange(len(ids) - 1) != first


def test_images_are_found_in_packed_documents() -> None:
    images = images_of(vector_batch(PACKED, counted=without_first_image), 1)
    assert images.sequence.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert images.position.tolist() == [2, 8, 15, 2, 6, 13, 20]
    assert images.size.tolist() == [2, 3, 1, 2, 3, 1, 2]
    assert images.document.tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert images.counts.tolist() == [False, False, False, False, True, False, False]
    assert images.is_condition.tolist() == [True, False, True, False, False, False, False]
    assert [images.num_before(image) for image in range(7)] == [0, 0, 0, 0, 1, 0, 0]
    assert images.spans(24)[3:5] == [(26, 28), (30, 33)]


@pytest.mark.parametrize("towers", [MOT, DENSE], ids=["mot", "dense"])
def test_no_id_is_predicted_where_a_vector_is_input_or_target(towers: dict[str, str]) -> None:
    batch = vector_batch()
    inputs = build_inputs(batch, vector_config(towers), formats={"image": FORMAT})
    vectors = inputs.vectors["image"]
    code = VOCABULARY.first_code("image")
    back = inputs.routing.to_sequence
    weights = inputs.loss_weights.sum(dim=0)[back].reshape(2, -1).numpy()
    unpredicted = (batch.input_ids == code) | (batch.target_ids == code)
    assert np.array_equal(weights, np.where(unpredicted, 0, batch.loss_weights))
    assert inputs.weight_per_modality[1] == 0 and vectors.num_slots == unpredicted.sum()
    assert torch.equal(inputs.input_ids[vectors.rows], torch.full((14,), code))
    stored = batch.vectors["image"].values.astype(np.float32)
    assert np.array_equal(vectors.values.numpy(), (stored - np.float32(0.25)) / np.float32(0.5))
    assert vectors.weights[1].tolist() == [1.0] * 7 and not vectors.weights[[0, 2]].any()


def test_noise_depends_on_the_place_in_the_global_batch_alone() -> None:
    """Of two sequences in one micro-batch, and of each alone."""
    config = vector_config(MOT)
    together = vector_inputs_of(vector_batch(), config, first=4).vectors["image"]
    batch = vector_batch()
    alone = [vector_inputs_of(batch.rows(i, i + 1), config, first=4 + i).vectors["image"] for i in (0, 1)]
    assert together.target is not None
    for name in ("values", "target", "times"):
        parts = torch.cat([getattr(each, name) for each in alone])
        assert torch.equal(getattr(together, name), parts)
    other = vector_inputs_of(batch, config, first=4, step=1).vectors["image"]
    assert not (other.times == together.times).any() and other.target is not None
    assert not (other.target == together.target).any()


def test_an_image_without_loss_stays_clean_and_conditions_have_less_noise() -> None:
    batch = vector_batch(counted=without_first_image)
    config = vector_config(MOT, image={"condition_max_time": 1e-3})
    clean = build_inputs(batch, config, formats={"image": FORMAT}).vectors["image"]
    noised = with_noise(clean, config.vectors["image"], draw_of())
    same = (noised.values == clean.values).all(dim=1)
    assert torch.equal(same, ~torch.from_numpy(np.repeat(clean.images.counts, clean.images.size)))
    assert noised.times.nonzero().flatten().tolist() == [4]
    every = vector_inputs_of(vector_batch(), config).vectors["image"]
    assert torch.equal(every.times < 1e-3, torch.from_numpy(every.images.is_condition))


def test_vectors_without_an_opening_delimiter_or_form_are_an_error() -> None:
    batch = vector_batch()
    with pytest.raises(AssertionError, match="image"):
        build_inputs(batch, vector_config(MOT))
    cut = Batch(**vars(batch) | {"document_ids": np.cumsum(np.ones((2, 24), np.int32), axis=1) - 1})
    with pytest.raises(AssertionError, match="nothing opens"):
        images_of(cut, 1)
