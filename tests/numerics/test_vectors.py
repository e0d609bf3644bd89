"""Images as vectors against the token-by-token reference, and the identities that reduce them to ids."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs
from pretrain.models.noising import training_draw
from pretrain.models.pretraining import Pretraining
from tests.numerics.naive_vectors import NaiveVectors
from tests.numerics.test_naive_mot import assert_is_reference, gradients_of, perturbed
from tests.pretrain.models.precision import assert_close, cast
from tests.pretrain.models.random_batch import DENSE, IMAGE_SPEECH_SHARED, MOT, TWO_TOWERS
from tests.pretrain.models.vector_batch import (
    FORMAT,
    PACKED,
    TWO,
    VOCABULARY,
    vector_batch,
    vector_config,
    vector_inputs_of,
)

NO_IMAGES = (((4,), (2, "s3")), ((9, "s2"),))
TWO_MODALITIES = (((3, "i4"), ("i2", 4)), (("i3",), (3,), (1, "i1", "i2")))
CASES: dict[str, tuple[dict[str, str], dict[str, Any], Any]] = {
    "mot": (MOT, {"num_layers": 2}, PACKED),
    "dense_causal": (DENSE, {"image": {"bidirectional": False}}, PACKED),
    "two_modalities_flow": (TWO_TOWERS, {"image": {"objective": "flow"}}, TWO_MODALITIES),
    "image_speech_shared_v": (
        IMAGE_SPEECH_SHARED,
        {"norm_placement": "pre", "image": {"prediction": "v", "condition_max_time": 0.25}},
        PACKED,
    ),
    "image_absent": (MOT, {}, NO_IMAGES),
    "adapters_untied_none": (
        MOT,
        {"untied": ["feed_forward", "vectors"], "image": {"objective": "none"}},
        PACKED,
    ),
}


@pytest.mark.parametrize(("towers", "changes", "documents"), CASES.values(), ids=CASES.keys())
def test_decoder_equals_the_reference(towers: dict[str, str], changes: dict, documents: Any) -> None:
    config = vector_config(towers, **{"num_layers": 1, **changes})
    vocabulary = TWO if towers == TWO_TOWERS else VOCABULARY
    batch = vector_batch(documents, vocabulary=vocabulary, seed=3)
    decoder = perturbed(config)
    inputs = vector_inputs_of(batch, config, step=2, first=5, scale=1.7)
    reference = NaiveVectors(config, dict(decoder.named_parameters()), "image", FORMAT)
    expected, logits = reference.objective_of(batch, partial(training_draw, 7, 2), 5, 1.7)
    expected.backward()
    assert_is_reference(decoder, inputs, (logits.flatten(0, 1), expected, gradients_of(reference)))


def outcome(decoder: Decoder, inputs: ModelInputs) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(objective, stats, gradients) in fp64."""
    decoder, inputs = cast(decoder, inputs, torch.float64)
    decoder.zero_grad()
    objective, stats, _ = Pretraining(decoder)(inputs)
    objective.backward()
    return objective.detach(), stats, {name: p.grad for name, p in decoder.named_parameters()}


def test_towers_that_are_copies_are_the_dense_model() -> None:
    dense, mot = perturbed(vector_config(DENSE)), Decoder(vector_config(MOT))
    with torch.no_grad():
        for name, parameter in mot.named_parameters():
            stem, _, tower = name.rpartition(".")
            parameter.copy_(dense.get_parameter(f"{stem}.{'all' if tower in MOT else tower}"))
    batch = vector_batch()
    objective, stats, _ = outcome(dense, vector_inputs_of(batch, dense.config))
    other, others, _ = outcome(mot, vector_inputs_of(batch, mot.config))
    assert_close(other, objective, "objective")
    assert_close(others, stats, "sums")


def test_images_of_one_vector_are_causal() -> None:
    batch = vector_batch(((("i1", 3), ("i1", "i1")), ((2, "i1"),)))
    configs = [vector_config(MOT, image={"bidirectional": both}) for both in (False, True)]
    (objective, _, gradients), (other, _, others) = (
        outcome(perturbed(config), vector_inputs_of(batch, config)) for config in configs
    )
    assert torch.equal(objective, other)
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_an_image_without_loss_is_clean_context() -> None:
    """As with objective none, once a time adds nothing."""
    batch = vector_batch(counted=lambda ids: ids[:-1] != VOCABULARY.delimiters("image")[0])
    config, context = vector_config(MOT), vector_config(MOT, image={"objective": "none"})
    decoder = perturbed(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.startswith("vectors.image.time."):
                parameter.zero_()
    plain = Decoder(context)
    plain.load_state_dict({n: p for n, p in decoder.state_dict().items() if n in plain.state_dict()})
    objective, stats, gradients = outcome(decoder, vector_inputs_of(batch, config))
    other, others, theirs = outcome(plain, vector_inputs_of(batch, context))
    assert torch.equal(objective, other) and torch.equal(stats, others)
    assert all(torch.equal(gradients[name], of) for name, of in theirs.items())
    assert stats[1] == stats[4] == 0
    assert not gradients["vectors.image.leave.weight.shared"].any()


def test_weight_0_of_images_leaves_the_loss_of_ids() -> None:
    config, batch = vector_config(MOT), vector_batch()
    decoder = perturbed(config)
    objective, stats, gradients = outcome(decoder, vector_inputs_of(batch, config, scale=0.0))
    assert_close(objective, stats[0] + stats[2], "objective")
    assert stats[1] > 0 and not gradients["vectors.image.leave.weight.shared"].any()
    assert gradients["vectors.image.enter.weight.shared"].any()


@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_vector_is_seen_by_its_image_and_by_what_follows(bidirectional: bool) -> None:
    """The middle vector of the second image changes, which begins at slot 12 of one document of two."""
    config = vector_config(MOT, image={"bidirectional": bidirectional})
    batch = vector_batch((((2, "i2", 1, "i3", 2), ("i2",)),))
    decoder, inputs = cast(perturbed(config), vector_inputs_of(batch, config), torch.float64)
    vectors = inputs.vectors["image"]
    first = int(vectors.images.position[1])
    values = vectors.values.clone()
    values[3] += 0.5
    changed = replace(inputs, vectors={"image": replace(vectors, values=values)})
    with torch.no_grad():
        found = [decoder.hidden(each)[0][inputs.routing.to_sequence] for each in (inputs, changed)]
    moved = (found[0] != found[1]).any(dim=1)
    end = int((batch.document_ids[0] == 0).sum())
    expected = torch.zeros(batch.sequence_tokens, dtype=torch.bool)
    expected[first if bidirectional else first + 1 : end] = True
    assert torch.equal(moved, expected)


@pytest.mark.parametrize("keys", ["all", "selected"])
def test_routed_text_around_images_at_ratio_1_is_none(keys: str) -> None:
    table = {"schedule": "constant", "mean_ratio": 1.0, "dense_above": 1.0, "rule": "top_k", "gate": "none"}
    plain = vector_config(MOT)
    routed = vector_config(MOT, depth={"text": table}, depth_block={"keys": keys, "scale": "selected"})
    batch = vector_batch()
    decoder, other = perturbed(plain), Decoder(routed)
    other.load_state_dict(other.state_dict() | decoder.state_dict())
    inputs = vector_inputs_of(batch, routed)
    objective, stats, gradients = outcome(decoder, vector_inputs_of(batch, plain))
    theirs, sums, others = outcome(other, inputs)
    assert_close(theirs, objective, "objective")
    assert_close(sums, stats, "sums")
    for name, gradient in gradients.items():
        assert_close(others[name], gradient, name, floor=1e-3)
    _, report = other.hidden(inputs)
    assert {int(block.visible_pairs) for block in report.layers.values()} == {inputs.visible_pairs}
