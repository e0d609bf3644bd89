"""Held-out images have one noise in all evaluations."""

import numpy as np
import torch

from pretrain.evaluation.image_noise import by_time, time_rows, with_fixed_noise
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.random_batch import MOT
from tests.pretrain.models.vector_batch import FORMAT, vector_batch, vector_config


def test_the_noise_of_a_text_does_not_depend_on_where_it_stands() -> None:
    """Nor on what precedes its image: an image behind one text, then behind another in another sequence."""
    config = vector_config(MOT, image={"times": "uniform"})
    batches = [vector_batch((((2, "i3"), ("i2",)),)), vector_batch(((("i2",), ("s1",)), ((5, "i3"),)))]
    (first,), (second,) = (
        [with_fixed_noise(build_inputs(batch, config, formats={"image": FORMAT}), config, texts)]
        for batch, texts in zip(batches, ([[4, 6]], [[6, 5], [4]]), strict=True)
    )
    ours, theirs = first.vectors["image"], second.vectors["image"]
    assert ours.times.tolist() == theirs.times.tolist()[::-1]
    assert ours.target is not None and theirs.target is not None
    assert torch.equal(ours.target[:3], theirs.target[2:]) and torch.equal(ours.target[3:], theirs.target[:2])


def test_quarters_of_times_are_parts_of_the_whole() -> None:
    config = vector_config(MOT)
    texts = [[0, 1, 2], [3, 4, 5]]
    inputs = with_fixed_noise(build_inputs(vector_batch(), config, formats={"image": FORMAT}), config, texts)
    module = Pretraining(Decoder(config)).eval()
    with torch.no_grad():
        _, whole, _ = module(inputs)
        _, apart, _ = module(by_time(inputs, config))
    nats, weights = apart.chunk(2)
    assert time_rows(["image"]) == {f"image/time_{quarter}": "image" for quarter in range(1, 5)}
    assert nats[1] == weights[1] == 0
    assert torch.allclose(nats[3:].sum(), whole[1]) and weights[3:].sum() == whole[4] == 7
    times = inputs.vectors["image"].times.numpy()
    assert weights[3:].tolist() == np.bincount((4 * times).astype(int), minlength=4).tolist()
    assert torch.allclose(nats[[0, 2]], whole[[0, 2]]) and inputs.loss_weights.shape[0] == 3
