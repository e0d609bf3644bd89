"""Elements of a block that have a key each against the token-by-token reference: logits, objective and every
gradient. With their neutral values they are not there."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.dropout import DropoutDraw
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from tests.numerics.naive_elements import NaiveElements
from tests.numerics.test_naive_depth import THRESHOLDS
from tests.numerics.test_naive_mot import assert_is_reference, gradients_of, perturbed
from tests.pretrain.models.random_batch import DENSE, MOT, depth_tables, random_batch, tiny_config

LLAMA3 = {
    "kind": "llama3", "factor": 8.0, "original_context_tokens": 16, "low_freq_factor": 0.3,
    "high_freq_factor": 2.0,
}  # fmt: skip
YARN = {"kind": "yarn", "factor": 4.0, "original_context_tokens": 2000}
"""Both put one of four pairs between the ends of their ramps."""
DROPOUT = {"dropout": 0.3, "embedding_dropout": 0.2}
LAYER = {"norm": "layer", "qk_norm": "layer"}
WIDE = {"head_size": 8, "num_heads": 2, "num_kv_heads": 1, "rope_theta": 300.0}
DEPTH = {"num_layers": 3, "context_tokens": 8}
_ROUTED = {"schedule": "alternating", "mean_ratio": 0.8, "min_ratio": 0.1, "rule": "threshold"}


def routed(**block: str) -> dict[str, Any]:
    return DEPTH | depth_tables(("image", "text"), **_ROUTED, **block)


CASES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "layer norms": (MOT, LAYER),
    "layer norms before sublayers, tied": (MOT, {**LAYER, "untied": ["attention"], "norm_placement": "pre"}),
    "layer norms in one tower": (DENSE, {**LAYER, "norm_placement": "pre"}),
    "layer norm of queries and keys alone": (MOT, {"qk_norm": "layer", "qk_norm_eps": 0.1}),
    "another eps": (MOT, {"norm": "layer", "qk_norm_eps": 0.1}),
    "biases": (MOT, {"qkv_bias": True, "qk_norm": False}),
    "tied biases": (MOT, {"qkv_bias": True, "untied": ["feed_forward"]}),
    "linear": (MOT, {"rope_scaling": {"kind": "linear", "factor": 3.0}}),
    "llama3": (MOT, {**WIDE, "rope_scaling": LLAMA3}),
    "yarn": (MOT, {**WIDE, "rope_scaling": YARN}),
    "dropout": (MOT, DROPOUT),
    "dropout before the residual": (MOT, {**DROPOUT, "norm_placement": "pre"}),
    "dropout of the embedding alone": (DENSE, {"embedding_dropout": 0.5}),
    "experts": (MOT, {**DROPOUT, **LAYER, "experts": {"text": {"num_experts": 2}}}),
    "depth": (MOT, {**DROPOUT, **LAYER, "qkv_bias": True, **routed()}),
    "depth, selected keys": (MOT, {**DROPOUT, "qkv_bias": True, **routed(keys="selected", scale="all")}),
    "depth of the feed-forward": (MOT, {**DROPOUT, **LAYER, **routed(parts="feed_forward")}),
}


@pytest.mark.parametrize("case", CASES)
def test_decoder_equals_the_reference(case: str) -> None:
    towers, changes = CASES[case]
    config = tiny_config(towers, **changes)
    batch = random_batch(config, sequences=2, seed=1)
    decoder = perturbed(config)
    inputs = build_inputs(batch, config, routing_state=RoutingState(thresholds=THRESHOLDS))
    inputs = replace(inputs, dropout=DropoutDraw(seed=7, step=3, sequences=range(5, 11, 3)))
    reference = NaiveElements(config, dict(decoder.named_parameters()), thresholds=THRESHOLDS)
    reference.seed, reference.step, reference.sequences = 7, 3, (5, 8)
    expected, logits = reference.objective(batch)
    expected.backward()
    filled = torch.from_numpy(batch.document_ids >= 0).flatten()
    assert_is_reference(
        decoder, inputs, (logits.flatten(0, 1), expected, gradients_of(reference)), rows=filled, floor=1e-2
    )


NEUTRAL = {
    "eps of its own": {"qk_norm_eps": 1e-5},
    "a name of RMSNorm": {"qk_norm": "rms"},
    "biases of zero": {"qkv_bias": True},
    "a factor of 1": {"rope_scaling": {"kind": "linear", "factor": 1.0}},
    "waves that llama3 leaves": {"rope_scaling": LLAMA3 | {"original_context_tokens": 10**7}},
}


@pytest.mark.parametrize("case", NEUTRAL)
def test_a_neutral_value_changes_no_bit(case: str) -> None:
    results = []
    for changes in ({}, NEUTRAL[case]):
        config = tiny_config(MOT, **changes)
        module = Pretraining(Decoder(config, seed=5))
        objective, *_ = module(build_inputs(random_batch(config), config))
        objective.backward()
        results.append((objective.detach(), {n: p.grad for n, p in module.named_parameters()}))
    (plain, gradients), (neutral, others) = results
    assert torch.equal(plain, neutral)
    assert all(torch.equal(gradient, others[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("mistake", [{"dropout": 0.31}, {"qk_norm_eps": 0.11}, {"norm_eps": 2e-5}], ids=str)
def test_a_small_mistake_is_far_from_the_reference(mistake: dict[str, float]) -> None:
    config = tiny_config(MOT, **LAYER, **DROPOUT, qk_norm_eps=0.1)
    batch = random_batch(config, sequences=2, seed=1)
    decoder = perturbed(config).double()
    inputs = replace(build_inputs(batch, config), dropout=DropoutDraw(0, 0, range(2)))
    reference = NaiveElements(
        config.model_copy(update=mistake), dict(decoder.named_parameters()), thresholds={}
    )
    reference.sequences = (0, 1)
    _, logits = reference.objective(batch)
    found = decoder(inputs)[inputs.routing.to_sequence]
    assert float((found - logits.flatten(0, 1)).detach().abs().max()) > 1e-7
