"""Adapters of vectors on their own."""

from dataclasses import replace

import torch

from pretrain.models.decoder import Decoder
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.vectors import VectorAdapters, time_waves
from tests.pretrain.models.random_batch import MOT
from tests.pretrain.models.vector_batch import vector_batch, vector_config, vector_inputs_of


def test_times_turn_into_waves() -> None:
    waves = time_waves(torch.tensor([0.0, 0.25]))
    assert waves.shape == (2, 256)
    assert torch.equal(waves[0], torch.cat((torch.ones(128), torch.zeros(128))).double())
    assert torch.allclose(waves[1, 0], torch.tensor(250.0).double().cos())
    assert torch.allclose(waves[1, -1], torch.tensor(250.0 * 10_000 ** (-127 / 128)).double().sin())


def test_stages_hold_their_adapters_and_start_alike() -> None:
    config = vector_config(MOT)
    whole = dict(Decoder(config, seed=3).named_parameters())
    first, last = (Decoder(config, seed=3, sublayers=range(*cut)) for cut in ((0, 3), (3, 6)))
    parts = dict(first.named_parameters()) | dict(last.named_parameters())
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert not [name for name, _ in first.named_parameters() if "leave" in name]
    assert not whole["vectors.image.leave.weight.shared"].any()  # the first prediction is 0


def test_a_wide_model_divides_predictions_by_its_width() -> None:
    """As the head divides logits (ModelConfig.width_ratio)."""
    inputs = vector_inputs_of(vector_batch(), vector_config(MOT))
    hidden = torch.randn(48, 16, generator=torch.Generator().manual_seed(0))
    predicted = []
    for base in (16, 8):
        config = vector_config(MOT, mup_base_width=base)
        adapters = VectorAdapters(config, "image", InitialWeights.of(config, 1), enters=False, leaves=True)
        assert adapters.leave is not None
        with torch.no_grad():
            adapters.leave.weight["shared"].copy_(torch.eye(3, 16))
        predicted.append(adapters.predict(hidden, inputs.vectors["image"]))
    assert torch.equal(predicted[0], 2 * predicted[1])


def test_an_image_of_many_vectors_counts_as_one() -> None:
    config = vector_config(MOT)
    vectors = vector_inputs_of(vector_batch(), config).vectors["image"]
    adapters = VectorAdapters(config, "image", InitialWeights.of(config, 1), enters=False, leaves=True)
    assert vectors.target is not None
    errors = adapters.errors(torch.zeros(48, 16), vectors)
    expected = [part.square().mean() for part in vectors.target.split(vectors.images.size.tolist())]
    assert torch.allclose(errors, torch.stack(expected))
    empty = replace(vectors, target=None)
    try:
        adapters.errors(torch.zeros(48, 16), empty)
    except AssertionError as error:
        assert "noise was not drawn" in str(error)
    else:
        raise AssertionError("an image without noise has no loss")
