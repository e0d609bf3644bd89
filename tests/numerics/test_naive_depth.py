"""Depth routing against the token-by-token reference: logits, objective and every gradient."""

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from tests.numerics.naive_depth import NaiveDepth
from tests.numerics.test_naive_mot import assert_is_reference, gradients_of
from tests.pretrain.models.random_batch import (
    DENSE,
    MOT,
    depth_tables,
    random_batch,
    tiny_config,
    with_ids,
)

FP32, FLOOR = 6e-4, 1e-2
"""fp32 against fp64, relative to the largest magnitude in the tensor, or to FLOOR in one that should be 0.
Measured: 4.9e-5 where a softmax gate shrinks the whole stream, 2.2e-5 in routers, else 1.4e-5."""

PLACES = [("attention+feed_forward", "all"), ("attention+feed_forward", "selected"), ("feed_forward", "all")]
GATES = ["tanh", "sigmoid", "softmax", "shifted_softmax", "none"]
SCALES = ["selected", "all", "all_as_released"]
RULES = ["top_k", "threshold"]


def depth_config(
    towers: dict[str, str], modalities: tuple[str, ...] = ("image",), changes: dict[str, Any] | None = None,
    **depth: Any,
) -> ModelConfig:  # fmt: skip
    """Only the middle one of three blocks is routed: the last is scale-free behind it (RMSNorm), and gates
    of a whole stream then have no gradient."""
    table = {"schedule": "alternating", "mean_ratio": 0.8, "min_ratio": 0.1} | depth
    changes = {"num_layers": 3, **(changes or {})}
    return tiny_config(towers, **depth_tables(modalities, **table), **changes)


def perturbed(config: ModelConfig, seed: int = 5) -> Decoder:
    """Towers start as copies and norms as ones, which would hide a mistaken tower; routers start small."""
    decoder = Decoder(config, seed=seed)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            std = 4.0 if ".depth." in name else 0.1  # scores of 1
            parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    return decoder


def compare(
    config: ModelConfig, routing_state: RoutingState, present: tuple[int, ...] | None = None,
    document_mask: bool = True,
) -> list[dict]:  # fmt: skip
    """Returns what ran in each routed block of the last sequence."""
    batch = random_batch(config, sequences=2, seed=1, present=present)
    decoder = perturbed(config)
    inputs = build_inputs(batch, config, document_mask=document_mask, routing_state=routing_state)
    reference = NaiveDepth(
        config,
        dict(decoder.named_parameters()),
        thresholds=routing_state.thresholds,
        causal=routing_state.causal,
        document_mask=document_mask,
    )
    expected, expected_logits = reference.objective(batch)
    expected.backward()
    filled = torch.from_numpy(batch.document_ids >= 0).flatten()
    _, _, report = Pretraining(decoder)(inputs)
    if config.depth_block.parts != "feed_forward":
        pairs = sum(int(block.visible_pairs) for block in report.layers.values())
        assert pairs == reference.routed_pairs
    assert_is_reference(
        decoder,
        inputs,
        (expected_logits.flatten(0, 1), expected, gradients_of(reference)),
        rows=filled,
        floor=FLOOR,
        fp32=FP32,
    )
    return reference.ran


THRESHOLDS = {
    f"blocks.{layer}.depth.{m}": value
    for layer in range(3)
    for m, value in {"text": 0.05, "image": -0.02, "speech": 0.01}.items()
}


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("rule", "gate", "scale", "place"), product(RULES, GATES, SCALES, PLACES), ids=lambda v: str(v)
)
def test_every_form(rule: str, gate: str, scale: str, place: tuple[str, str]) -> None:
    changes = {"norm_placement": "pre" if rule == "top_k" else "post", "context_tokens": 10}
    parts, keys = place
    config = depth_config(
        MOT, ("image", "text"), changes, rule=rule, gate=gate, scale=scale, parts=parts, keys=keys
    )
    (ran,) = compare(config, RoutingState(thresholds=THRESHOLDS))
    assert len(set(ran.values())) == 2, "the test needs tokens that run and tokens that do not"


@pytest.mark.pairwise
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_towers_and_norms(towers: dict[str, str], norm: str, place: tuple[str, str]) -> None:
    config = depth_config(
        towers,
        ("speech", "image"),
        {"norm_placement": norm},
        schedule="constant",
        mean_ratio=0.4,
        rule="top_k",
        parts=place[0],
        keys=place[1],
    )
    assert len(compare(config, RoutingState())) == 3


@pytest.mark.pairwise
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize(("rule", "gate"), [("top_k", "softmax"), ("threshold", "tanh")])
def test_attention_across_documents(
    towers: dict[str, str], place: tuple[str, str], rule: str, gate: str
) -> None:
    """Documents are still what choices are made in."""
    config = depth_config(towers, ("image", "text"), rule=rule, gate=gate, parts=place[0], keys=place[1])
    (ran,) = compare(config, RoutingState(thresholds=THRESHOLDS), document_mask=False)
    assert len(set(ran.values())) == 2


@pytest.mark.diagonal
@pytest.mark.parametrize("present", [(0, 2), (1,)], ids=["no_image", "only_image"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_an_absent_modality(present: tuple[int, ...], place: tuple[str, str]) -> None:
    config = depth_config(MOT, ("image",), rule="top_k", parts=place[0], keys=place[1])
    compare(config, RoutingState(), present)


@pytest.mark.pairwise
@pytest.mark.parametrize("threshold", [-1e3, 1e3], ids=["everything", "nothing"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_everything_and_nothing_runs(threshold: float, scale: str, place: tuple[str, str]) -> None:
    """Nothing: streams of 0 rows, but for special tokens."""
    config = depth_config(DENSE, ("text", "image", "speech"), rule="threshold", scale=scale, parts=place[0],
                          keys=place[1])  # fmt: skip
    (ran,) = compare(config, RoutingState(thresholds=dict.fromkeys(THRESHOLDS, threshold)))
    assert any(ran.values()) == (threshold < 0) or sum(ran.values()) < len(ran) / 2


def test_no_row_at_all() -> None:
    batch = random_batch(tiny_config(DENSE))
    batch = with_ids(batch, np.maximum(batch.input_ids, 7))
    chosen = RoutingState(thresholds=dict.fromkeys(THRESHOLDS, 1e3))
    for keys in ("selected", "all"):
        config = depth_config(DENSE, ("text", "image", "speech"), rule="threshold", keys=keys)
        decoder = perturbed(config)
        objective, *_ = Pretraining(decoder)(build_inputs(batch, config, routing_state=chosen))
        objective.backward()
        block = {n: p for n, p in decoder.named_parameters() if n.startswith("blocks.1.")}
        assert block and all(p.grad is not None and not p.grad.any() for p in block.values())


def test_evaluation_by_thresholds_of_a_model_that_chooses_by_rank() -> None:
    config = depth_config(MOT, ("image", "text"), rule="top_k")
    compare(config, RoutingState(causal=True, thresholds=THRESHOLDS))
