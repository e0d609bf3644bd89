"""Depth routing and experts in one tower: against the token-by-token reference, by the identities that reduce
either, and who sees later tokens."""

from itertools import cycle, product
from typing import Any

import pytest
import torch

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from pretrain.train import expert_steps
from tests.numerics.test_depth_causality import CONTEXT, reached
from tests.numerics.test_experts_identities import run
from tests.numerics.test_naive_depth import (
    GATES,
    PLACES,
    RULES,
    SCALES,
    THRESHOLDS,
    compare,
    depth_config,
)
from tests.pretrain.models.precision import PRECISIONS, assert_close
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    depth_tables,
    random_batch,
    tiny_config,
)
from tests.pretrain.models.test_depth import EVERYTHING

EXPERTS: dict[str, dict[str, Any]] = {
    "expert_choice": {"num_experts": 3, "router_z": 0.2},
    "half_capacity": {"num_experts": 4, "capacity_factor": 0.5, "ffn_hidden": 8},
    "token_choice": {
        "num_experts": 3, "routing": "token_choice", "top_k": 2, "load_balance": 0.3, "router_z": 0.2,
    },
    "several": {"num_experts": 4, "routing": "token_choice", "top_k": 3},
}  # fmt: skip
PLACE_KEYS = [{"parts": parts, "keys": keys} for parts, keys in PLACES]


def config_of(towers: dict[str, str], experts: dict[str, Any], **options: Any) -> ModelConfig:
    """Experts in every tower."""
    changes = {"experts": dict.fromkeys(towers.values(), experts), **options.pop("changes", {})}
    return depth_config(towers, changes=changes, **options)


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("rule", "gate", "scale", "place", "experts"),
    [
        (*form, name)
        for form, name in zip(product(RULES, GATES, SCALES, PLACE_KEYS), cycle(EXPERTS), strict=False)
    ],
    ids=lambda v: str(v),
)
def test_every_form(rule: str, gate: str, scale: str, place: dict[str, str], experts: str) -> None:
    changes = {"norm_placement": "pre" if rule == "top_k" else "post", "context_tokens": 10}
    config = config_of(
        MOT, EXPERTS[experts], modalities=("image", "text"), changes=changes, rule=rule, gate=gate,
        scale=scale, **place,
    )  # fmt: skip
    (ran,) = compare(config, RoutingState(thresholds=THRESHOLDS))
    assert len(set(ran.values())) == 2, "the test needs tokens that run and tokens that do not"


@pytest.mark.pairwise
@pytest.mark.parametrize("towers", [DENSE, IMAGE_SPEECH_SHARED], ids=["dense", "shared"])
@pytest.mark.parametrize("place", PLACE_KEYS, ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
def test_towers_of_several_modalities(towers: dict[str, str], place: dict[str, str], experts: str) -> None:
    """Their slices are sorted by modality; what experts choose among is a sequence, in its order."""
    config = config_of(
        towers, EXPERTS[experts], modalities=("speech", "image"), changes={"norm_placement": "pre"},
        schedule="constant", mean_ratio=0.4, rule="top_k", **place,
    )  # fmt: skip
    assert len(compare(config, RoutingState())) == 3


@pytest.mark.parametrize("experts", EXPERTS)
def test_depth_and_experts_of_different_towers(experts: str) -> None:
    """Depth sorts the stream by modality in all towers."""
    config = depth_config(
        IMAGE_SPEECH_SHARED, ("text",), {"experts": {"other": EXPERTS[experts]}}, rule="top_k"
    )
    compare(config, RoutingState())


@pytest.mark.parametrize(("experts", "towers"), zip(EXPERTS, cycle([DENSE, MOT]), strict=False), ids=str)
def test_evaluation_by_thresholds_of_both(experts: str, towers: dict[str, str]) -> None:
    config = config_of(towers, EXPERTS[experts], modalities=("image", "text"), rule="top_k")
    thresholds = THRESHOLDS | dict.fromkeys(expert_steps.share_targets(config), -1.2)
    compare(config, RoutingState(causal=True, thresholds=thresholds))


@pytest.mark.parametrize(("experts", "threshold"), zip(EXPERTS, cycle([-1e3, 1e3]), strict=False))
def test_everything_and_nothing_runs(experts: str, threshold: float) -> None:
    config = config_of(DENSE, EXPERTS[experts], modalities=("text", "image", "speech"), rule="threshold")
    compare(config, RoutingState(thresholds=dict.fromkeys(THRESHOLDS, threshold)))


@pytest.mark.parametrize(("experts", "present"), zip(EXPERTS, cycle([(0, 2), (1,)]), strict=False), ids=str)
def test_an_absent_modality(experts: str, present: tuple[int, ...]) -> None:
    compare(config_of(MOT, EXPERTS[experts], rule="top_k"), RoutingState(), present)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("place", PLACE_KEYS, ids=str)
def test_one_expert_is_none(
    towers: dict[str, str], routing: str, place: dict[str, str], dtype: torch.dtype
) -> None:
    options = {"modalities": ("image", "text"), "rule": "top_k", **place}
    batch = random_batch(tiny_config(towers), sequences=3, seed=2, padding_tokens=0)
    logits, objective, grads = run(
        config_of(towers, {"num_experts": 1, "routing": routing}, **options), batch, dtype=dtype
    )
    plain_logits, plain_objective, plain = run(depth_config(towers, **options), batch, dtype=dtype)
    assert_close(logits, plain_logits, "logits")
    assert_close(objective, plain_objective, "objective")
    for name, grad in grads.items():
        if ".router." in name:
            assert not grad.any(), name
        else:
            assert_close(grad.view_as(plain[name]), plain[name], name)


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("towers", [DENSE, MOT, IMAGE_SPEECH_SHARED], ids=["dense", "mot", "shared"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_ratio_1_with_neutral_gates_is_experts_alone(
    towers: dict[str, str], scale: str, experts: str, dtype: torch.dtype
) -> None:
    alone = tiny_config(towers, experts=dict.fromkeys(towers.values(), EXPERTS[experts]))
    config = tiny_config(towers, **depth_tables(towers, **EVERYTHING, scale=scale))
    depth = {"depth": config.depth, "depth_block": config.depth_block}
    batch = random_batch(alone, sequences=3, seed=2)
    _, objective, plain = run(alone, batch, dtype=dtype)
    _, routed_objective, routed = run(alone.model_copy(update=depth), batch, dtype=dtype)
    assert_close(routed_objective, objective, "objective")
    for name, expected in plain.items():
        assert_close(routed[name], expected, name, floor=1.0)
    assert all(not grad.any() for name, grad in routed.items() if ".depth." in name)


@pytest.mark.diagonal
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_recomputation_changes_and_counts_nothing(rule: str, experts: str) -> None:
    config = config_of(DENSE, EXPERTS[experts], modalities=("image", "text"), rule=rule)
    inputs = build_inputs(random_batch(config), config)
    found = []
    for again in (False, True):
        module = Pretraining(Decoder(config, activation_checkpointing=again))
        objective, _, report = module(inputs)
        objective.backward()
        tensors = {name: p.grad for name, p in module.named_parameters()}
        found.append(tensors | {"objective": objective, "report": report.pack()})
        block = report.layers[1]
        assert block.experts["all"].taken.any() and block.depth["image"].run > 0
    kept, recomputed = found
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "one_document"])
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("place", PLACE_KEYS, ids=str)
def test_causal_rules_of_both_see_no_later_token(
    place: dict[str, str], towers: dict[str, str], packed: bool
) -> None:
    options = {
        "modalities": ("image", "text"), "schedule": "constant", "mean_ratio": 0.5, **place,
        "changes": {"context_tokens": CONTEXT, "norm_placement": "pre"},
    }  # fmt: skip
    model = config_of(towers, EXPERTS["token_choice"], rule="threshold", **options)
    assert model.is_causal
    assert not reached(model, packed, RoutingState(thresholds=THRESHOLDS))

    # Either one that looks ahead is seen, and their causal forms do not.
    for rule, experts in (("top_k", "token_choice"), ("threshold", "expert_choice")):
        model = config_of(towers, EXPERTS[experts], rule=rule, **options)
        thresholds = THRESHOLDS | dict.fromkeys(expert_steps.share_targets(model), -1.1)
        assert not model.is_causal and model.has_causal_form
        assert packed or reached(model, packed, RoutingState(thresholds=thresholds))
        assert not reached(model, packed, RoutingState(causal=True, thresholds=thresholds))
