import dataclasses

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from pretrain.models.inputs import build_inputs
from tests.pretrain.models.random_batch import DENSE, IMAGE_SPEECH_SHARED, MOT, random_batch, tiny_config


@pytest.mark.parametrize("towers", [DENSE, MOT, IMAGE_SPEECH_SHARED])
def test_every_field_is_the_batch_in_sorted_order(towers: dict[str, str]) -> None:
    config = tiny_config(towers)
    batch = random_batch(config, sequences=3, seed=4)
    inputs = build_inputs(batch, config)
    order = inputs.routing.to_sorted.numpy()
    for ours, theirs in (
        (inputs.input_ids, batch.input_ids),
        (inputs.target_ids, batch.target_ids),
        (inputs.positions, batch.positions),
        (inputs.loss_weights.sum(dim=0), batch.loss_weights),
    ):
        np.testing.assert_array_equal(ours.numpy(), theirs.reshape(-1)[order])
    tower = np.array(config.tower_of_modality)[batch.input_modality.reshape(-1)[order]]
    assert (np.diff(tower) >= 0).all()
    assert inputs.routing.counts == tuple(np.bincount(tower, minlength=len(config.tower_names)))
    for row, modality in enumerate(config.modalities):
        weights = np.where(batch.target_modality == row, batch.loss_weights, 0).reshape(-1)[order]
        np.testing.assert_array_equal(inputs.loss_weights[row].numpy(), weights, err_msg=modality)
    assert inputs.samples == batch.samples


def test_sums_are_known_on_the_host() -> None:
    config = tiny_config(MOT)
    batch = random_batch(config, sequences=2, seed=1, padding_tokens=4)
    halved = dataclasses.replace(batch, loss_weights=batch.loss_weights * 0.5)
    inputs = build_inputs(halved, config)
    filled = batch.document_ids >= 0
    assert inputs.weight == pytest.approx(0.5 * filled.sum(), abs=0)
    assert inputs.weight_per_modality == tuple(
        0.5 * float((filled & (batch.target_modality == m)).sum()) for m in range(3)
    )
    assert inputs.input_tokens == tuple(int((filled & (batch.input_modality == m)).sum()) for m in range(3))
    assert inputs.num_tokens == 24
    assert all(type(n) is int for n in (*inputs.input_tokens, inputs.visible_pairs))


def test_visible_pairs_leave_padding_out() -> None:
    config = tiny_config(DENSE, context_tokens=6)
    documents = np.array([[0, 0, 0, 1, 1, -1], [0, 0, 0, 0, 0, 0]], np.int32)
    flat = np.zeros_like(documents)
    batch = Batch(
        flat,
        flat,
        flat.astype(np.float32),
        flat,
        documents,
        flat.astype(np.uint8),
        flat.astype(bool),
        flat.astype(np.uint8),
        ((), ()),
    )
    assert build_inputs(batch, config).visible_pairs == 6 + 3 + 21
    crossing = build_inputs(batch, config, document_mask=False)
    assert crossing.visible_pairs == 15 + 21
    assert crossing.mask.segments == (6, 6)


def test_to_moves_every_tensor_and_keeps_values() -> None:
    config = tiny_config(MOT)
    inputs = build_inputs(random_batch(config), config)
    moved = inputs.to("meta")
    for field in ("input_ids", "target_ids", "loss_weights", "positions"):
        assert getattr(moved, field).device.type == "meta"
    assert moved.mask.documents.device.type == moved.routing.to_sorted.device.type == "meta"
    assert inputs.to("cpu").routing.counts == inputs.routing.counts
    assert torch.equal(inputs.to("cpu").input_ids, inputs.input_ids)
