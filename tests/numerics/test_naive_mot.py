"""The decoder against the token-by-token reference: logits, objective and every gradient."""

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.numerics.naive_mot import NaiveMoT
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    TWO_TOWERS,
    random_batch,
    tiny_config,
)

# fp32 against fp64. Largest differences measured over the cases below, relative to the largest magnitude in
# the tensor: logits 6e-7, objective 1e-7, gradients 4e-6.
RELATIVE = 1e-5

CASES = {
    "dense": (DENSE, {}, None),
    "mot_2_post": (TWO_TOWERS, {}, None),
    "mot_2_pre": (TWO_TOWERS, {"norm_placement": "pre"}, None),
    "mot_3_post": (MOT, {}, None),
    "mot_3_pre": (MOT, {"norm_placement": "pre"}, None),
    "image_speech_shared": (IMAGE_SPEECH_SHARED, {"norm_placement": "pre"}, None),
    "image_absent": (MOT, {}, (0, 2)),
    "only_speech": (MOT, {"norm_placement": "pre"}, (2,)),
    "only_feed_forward_untied": (MOT, {"untied": ["feed_forward"]}, None),
    "only_attention_untied": (MOT, {"untied": ["attention"]}, None),
    "only_norm_untied": (MOT, {"untied": ["norm"], "norm_placement": "pre"}, None),
    "all_tied": (MOT, {"untied": []}, None),
    "no_qk_norm": (MOT, {"qk_norm": False}, None),
    "one_query_per_key": (MOT, {"num_kv_heads": 4}, None),
    "one_key_for_all": (MOT, {"num_kv_heads": 1}, None),
    "wide_heads": (MOT, {"head_size": 6}, None),
    "z_loss": (MOT, {"z_loss": 0.1}, None),
}


def assert_close(ours: torch.Tensor, reference: torch.Tensor, what: str) -> None:
    scale = float(reference.detach().abs().max())
    difference = float((ours.detach().double() - reference.detach()).abs().max())
    assert difference <= RELATIVE * scale, f"{what}: {difference:.3g} on a scale of {scale:.3g}"


@pytest.mark.parametrize(("towers", "changes", "present"), CASES.values(), ids=CASES.keys())
def test_decoder_equals_algorithm_1(towers: dict[str, str], changes: dict, present: tuple | None) -> None:
    config = tiny_config(towers, **changes)
    batch = random_batch(config, sequences=2, seed=1, present=present)
    decoder = Decoder(config, seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # towers start as copies and norms as ones, which would hide a mistaken tower
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    inputs = build_inputs(batch, config)
    reference = NaiveMoT(config, dict(decoder.named_parameters()))

    expected, expected_logits = reference.objective(batch)
    logits = decoder(inputs)[inputs.routing.to_sequence]
    assert_close(logits, expected_logits.flatten(0, 1), "logits")

    objective, _ = Pretraining(decoder)(inputs)
    assert_close(objective, expected, "objective")
    expected.backward()
    objective.backward()
    for name, parameter in decoder.named_parameters():
        gradient = reference.weights[name].grad
        if gradient is None:  # the loop never met this tower; here the gradient is zero, not None
            assert parameter.grad is not None and not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert_close(parameter.grad, gradient, name)
