"""The decoder against the token-by-token reference: logits, objective and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from tests.numerics.naive_mot import NaiveMoT
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close, cast
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    TWO_TOWERS,
    random_batch,
    tiny_config,
)

FP32 = 2e-4
"""fp32 against fp64: 1.7e-5 of the largest entry measured, in a gradient."""

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
    "qkv_and_final_norm_untied": (MOT, {"untied": ["qkv", "final_norm"]}, None),
    "out_and_block_norm_untied": (MOT, {"untied": ["attention_out", "block_norm"]}, (0, 2)),
    "qk_norm_and_embedding_untied": (MOT, {"untied": ["qk_norm", "embedding"]}, None),
    "head_untied": (IMAGE_SPEECH_SHARED, {"untied": ["feed_forward", "head"], "z_loss": 0.1}, None),
    "tied_embeddings": (MOT, {"tied_embeddings": True}, None),
    "tied_per_tower": (MOT, {"untied": ["embedding", "head"], "tied_embeddings": True}, (0, 1)),
    "no_qk_norm": (MOT, {"qk_norm": False}, None),
    "one_query_per_key": (MOT, {"num_kv_heads": 4}, None),
    "one_key_for_all": (MOT, {"num_kv_heads": 1}, None),
    "wide_heads": (MOT, {"head_size": 6}, None),
    "z_loss": (MOT, {"z_loss": 0.1}, None),
}


def assert_is_reference(
    decoder: Decoder,
    inputs: ModelInputs,
    expected: tuple[Tensor, Tensor, dict[str, Tensor]],
    *,
    rows: slice | Tensor = slice(None),
    **limits: float,
) -> None:
    """The model, in fp32 and then in fp64, is the reference. `expected`: logits [tokens, vocab] in sequence
    order, of which `rows` count, objective, and gradients of the parameters that the reference met, in fp64.
    `limits`: of assert_close."""
    limits = {"fp32": FP32, **limits}
    expected_logits, expected_objective, gradients = expected
    for dtype in reversed(PRECISIONS):  # fp32 first, whose weights fp64 holds without rounding
        decoder, inputs = cast(decoder, inputs, dtype)
        decoder.zero_grad(set_to_none=True)
        logits = decoder(inputs)[inputs.routing.to_sequence]
        assert_close(logits[rows], expected_logits[rows], "logits", **limits)
        objective, *_ = Pretraining(decoder)(inputs)
        assert_close(objective, expected_objective, "objective", **limits)
        objective.backward()
        for name, parameter in decoder.named_parameters():
            assert parameter.grad is not None, name
            if name in gradients:
                assert_close(parameter.grad, gradients[name], name, **limits)
            else:  # the reference never met this tower; here the gradient is zero, not None
                assert not parameter.grad.any(), name


def gradients_of(reference: NaiveMoT) -> dict[str, Tensor]:
    """Of the weights that the reference met."""
    return {name: weight.grad for name, weight in reference.weights.items() if weight.grad is not None}


def perturbed(config: ModelConfig) -> Decoder:
    """A decoder whose towers and norms differ: at the start they are copies and ones, which would hide
    a mistake."""
    decoder = Decoder(config, seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder


@pytest.mark.parametrize(("towers", "changes", "present"), CASES.values(), ids=CASES.keys())
def test_decoder_equals_algorithm_1(towers: dict[str, str], changes: dict, present: tuple | None) -> None:
    config = tiny_config(towers, **changes)
    batch = random_batch(config, sequences=2, seed=1, present=present)
    decoder = perturbed(config)
    inputs = build_inputs(batch, config)
    reference = NaiveMoT(config, dict(decoder.named_parameters()))

    expected, expected_logits = reference.objective(batch)
    expected.backward()
    assert_is_reference(decoder, inputs, (expected_logits.flatten(0, 1), expected, gradients_of(reference)))


def test_weights_of_modalities_equal_the_reference() -> None:
    """Speech has weight 0: its targets give no gradient, and its tokens are context."""
    config, weights = tiny_config(MOT, z_loss=0.1), (0.5, 2.0, 0.0)
    batch = random_batch(config, sequences=2, seed=1)
    decoder = perturbed(config)
    inputs = build_inputs(batch, config, modality_weights=weights)
    reference = NaiveMoT(config, dict(decoder.named_parameters()))

    expected, expected_logits = reference.objective(batch, weights)
    expected.backward()
    assert_is_reference(decoder, inputs, (expected_logits.flatten(0, 1), expected, gradients_of(reference)))
    assert decoder.get_parameter("blocks.0.attention.qkv.weight.speech").grad.any()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "mistake",
    [{"norm_eps": 2e-5}, {"rope_theta": 9_900.0}, {"z_loss": 0.1001}, {"norm_placement": "pre"}],
    ids=str,
)
def test_a_small_mistake_is_far_from_the_reference(mistake: dict[str, Any]) -> None:
    config = tiny_config(MOT, z_loss=0.1)
    batch = random_batch(config, sequences=2, seed=1)
    decoder, inputs = cast(perturbed(config), build_inputs(batch, config), torch.float64)
    objective, *_ = Pretraining(decoder)(inputs)
    reference = NaiveMoT(config.model_copy(update=mistake), dict(decoder.named_parameters()))
    expected, _ = reference.objective(batch)
    assert abs(float(objective / expected) - 1) > 100 * TOLERANCE[torch.float64]
