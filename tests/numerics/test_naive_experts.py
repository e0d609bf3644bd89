"""Experts against the token-by-token reference: logits, objective with auxiliary losses, every gradient."""

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from tests.numerics.choice_margin import LEAST_MARGIN, choice_margin
from tests.numerics.naive_experts import NaiveExperts
from tests.numerics.test_naive_mot import assert_is_reference, gradients_of
from tests.pretrain.models.random_batch import DENSE, IMAGE_SPEECH_SHARED, MOT, random_batch, tiny_config

FOUR = {"num_experts": 4}
TOKEN = {"routing": "token_choice", "num_experts": 4}
TEXT_IMAGE = {"text": {**TOKEN, "top_k": 3, "num_experts": 3}, "image": {"num_experts": 2, "ffn_hidden": 8}}
CASES = {
    "moe_4x": (DENSE, {"all": FOUR}, {}, None),
    "moe_4x_pre": (DENSE, {"all": FOUR}, {"norm_placement": "pre"}, None),
    "moe_4x_of_tied_parts": (DENSE, {"all": FOUR}, {"untied": []}, None),
    "half_capacity": (DENSE, {"all": {**FOUR, "capacity_factor": 0.5}}, {}, None),
    "twice_the_capacity": (DENSE, {"all": {**FOUR, "capacity_factor": 2}}, {"norm_placement": "pre"}, None),
    "hybrid": (MOT, {"text": FOUR}, {}, None),
    "hybrid_without_text": (MOT, {"text": FOUR}, {}, (1, 2)),
    "one_choice": (DENSE, {"all": TOKEN}, {"norm_placement": "pre"}, None),
    "two_choices": (MOT, {"image": {**TOKEN, "top_k": 2}}, {"norm_placement": "pre"}, None),
    "many_experts": (DENSE, {"all": {**TOKEN, "num_experts": 40, "top_k": 2}}, {}, None),
    "several_towers": (MOT, TEXT_IMAGE, {"norm_placement": "pre"}, None),
    "two_modalities_of_a_tower": (IMAGE_SPEECH_SHARED, {"other": FOUR}, {}, None),
    "auxiliary": (
        DENSE,
        {"all": {**TOKEN, "load_balance": 0.3, "router_z": 0.2}},
        {"norm_placement": "pre"},
        None,
    ),
    "auxiliary_of_two": (MOT, {"text": {**TOKEN, "top_k": 2, "load_balance": 0.3}}, {}, None),
    "z_of_expert_choice": (MOT, {"text": {**FOUR, "router_z": 0.2}}, {}, None),
}


@pytest.mark.parametrize(("towers", "experts", "changes", "present"), CASES.values(), ids=CASES.keys())
def test_experts_are_those_of_the_papers(
    towers: dict[str, str], experts: dict, changes: dict, present: tuple | None
) -> None:
    config = tiny_config(towers, **changes, experts=experts)
    batch = random_batch(config, sequences=2, seed=1, present=present)
    decoder = Decoder(config, seed=5)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    inputs = build_inputs(batch, config)
    reference = NaiveExperts(config, dict(decoder.named_parameters()))

    with choice_margin(decoder) as margin:
        decoder(inputs)
    assert margin.least > LEAST_MARGIN, "a choice of these batches is so close that fp32 may make another"
    expected, expected_logits = reference.objective(batch)
    expected.backward()
    assert_is_reference(decoder, inputs, (expected_logits.flatten(0, 1), expected, gradients_of(reference)))
