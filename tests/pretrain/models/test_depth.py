"""Routers of a block: their weights, what they count, and that ratio 1 with neutral gates is no routing."""

from typing import Any

import pytest
import torch

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.depth import DepthRouter, DepthRouting
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close, cast
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    depth_tables,
    random_batch,
    tiny_config,
)

EVERYTHING = {
    "schedule": "constant", "mean_ratio": 1.0, "dense_above": 1.0, "gate": "none", "rule": "top_k",
}  # fmt: skip
PLACES = [
    {"keys": "all"},
    {"keys": "selected"},
    {"parts": "feed_forward"},
]


def routing_of(decoder: Decoder, block: int) -> DepthRouting:
    found = decoder.blocks[block].depth
    assert isinstance(found, DepthRouting)
    return found


def decoder_of(config: ModelConfig, checkpointing: bool = False) -> Decoder:
    """With weights that no symmetry hides, but neutral routers."""
    decoder = Decoder(config, seed=3, activation_checkpointing=checkpointing)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if ".depth." not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return decoder


def gradients(
    config: ModelConfig,
    dtype: torch.dtype = torch.float32,
    checkpointing: bool = False,
) -> dict[str, torch.Tensor]:
    """Objective and gradients of a model in `dtype`."""
    inputs = build_inputs(random_batch(config), config)
    decoder, inputs = cast(decoder_of(config, checkpointing), inputs, dtype)
    objective, *_ = Pretraining(decoder)(inputs)
    objective.backward()
    found = {"objective": objective.detach()}
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("towers", [DENSE, MOT, IMAGE_SPEECH_SHARED], ids=["dense", "mot", "shared"])
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("scale", ["selected", "all", "all_as_released"])
def test_ratio_1_with_a_neutral_gate_is_no_routing(
    towers: dict[str, str], place: dict[str, str], norm: str, scale: str, dtype: torch.dtype
) -> None:
    """Rows sorted by modality inside towers add up in another order, and queries and keys are products of
    their own."""
    tables = depth_tables(towers, **EVERYTHING, **place, scale=scale)
    plain = gradients(tiny_config(towers, norm_placement=norm), dtype)
    routed = gradients(tiny_config(towers, norm_placement=norm, **tables), dtype)
    for name, expected in plain.items():
        assert_close(routed[name], expected, name, floor=1.0)
    assert all(not grad.any() for name, grad in routed.items() if ".depth." in name)


@pytest.mark.parametrize("changes", [{"gate": "tanh"}, {"mean_ratio": 0.9}], ids=str)
def test_a_gate_or_a_ratio_that_is_not_neutral_is_far_from_no_routing(changes: dict[str, Any]) -> None:
    tables = depth_tables(MOT, **(EVERYTHING | changes))
    plain, routed = gradients(tiny_config(MOT)), gradients(tiny_config(MOT, **tables))
    worst = max(
        float((routed[name] - expected).abs().max()) / max(float(expected.abs().max()), 1.0)
        for name, expected in plain.items()
    )
    assert worst > 100 * TOLERANCE[torch.float32], worst


@pytest.mark.parametrize("place", [place for place in PLACES if place.get("keys") != "all"], ids=str)
@pytest.mark.parametrize("scale", ["selected", "all", "all_as_released"])
def test_ratio_1_with_a_neutral_gate_changes_no_bit_where_rows_keep_their_order(
    place: dict[str, str], scale: str
) -> None:
    """Not where keys are all: queries and keys are then products of other shapes, which may round
    otherwise."""
    config = tiny_config(MOT)
    tables = depth_tables(MOT, **EVERYTHING, **place, scale=scale)
    logits = []
    for model in (config, tiny_config(MOT, **tables)):
        inputs = build_inputs(random_batch(model, padding_tokens=0), model)
        logits.append(decoder_of(model)(inputs))
    assert torch.equal(*logits)


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("rule", ["top_k", "threshold"])
def test_recomputation_changes_nothing(place: dict[str, str], rule: str) -> None:
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": rule, **place}
    config = tiny_config(MOT, **depth_tables(("image", "text"), **table))
    kept, again = gradients(config), gradients(config, checkpointing=True)
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_what_routers_count() -> None:
    table = {"schedule": "alternating", "mean_ratio": 0.8, "rule": "top_k", "ramp_frac": 0.0}
    config = tiny_config(MOT, depth={"text": table, "speech": table}, context_tokens=40)
    batch = random_batch(config, padding_tokens=6)
    decoder = Decoder(config, activation_checkpointing=True)
    inputs = build_inputs(batch, config)
    _, report = decoder.hidden(inputs)
    assert decoder.blocks[0].depth is None
    assert report.layers[0].depth == {} and report.layers[0].visible_pairs == 0
    assert report.layers[1].visible_pairs > 0
    routers = routing_of(decoder, 1).routers()
    assert report.layers[1].depth.keys() == routers.keys()
    for modality, router in routers.items():
        assert router.name == f"blocks.1.depth.{modality}"
        counts = report.layers[1].depth[modality]
        m = config.modalities.index(modality)
        of_modality = (batch.input_modality == m) & (batch.document_ids >= 0)
        special = of_modality & (batch.input_ids < 7)
        assert special.any()  # ids of a random batch know no modality
        free = of_modality & ~special
        assert counts.histogram.sum() == counts.tokens == int(free.sum())
        assert int(counts.tokens) + special.sum() == inputs.input_tokens[m]
        # top_k: of each document the ratio of its tokens that may skip, the rest of the division dropped.
        documents = [free[row] & (batch.document_ids[row] == d) for row in (0, 1) for d in range(40)]
        assert counts.run == sum(int(router.ratio * each.sum() + 1e-9) for each in documents) > 0
        assert float(counts.gate) == pytest.approx(int(counts.tokens), rel=0.05)
        assert counts.gate_squared >= counts.gate**2 / counts.tokens


def test_weights_depend_on_seed_and_place_and_zero_init() -> None:
    def routers(**changes: Any) -> list[DepthRouter]:
        table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k", **changes}
        config = tiny_config(MOT, depth={"image": table, "speech": table}, d_model=256, num_heads=4)
        decoder = Decoder(config, seed=2)
        return [router for block in (0, 1) for router in routing_of(decoder, block).routers().values()]

    weights = [router.weight[router.tower] for router in routers()]
    assert all(0.08 < float(weight.norm()) / 256 < 0.12 for weight in weights)  # scores of 0.1
    assert len({float(weight[0]) for weight in weights}) == 4
    assert all(torch.equal(a, b.weight[b.tower]) for a, b in zip(weights, routers(), strict=True))
    assert not any(router.weight[router.tower].any() for router in routers(zero_init=True))


def test_causal_evaluation_of_a_top_k_model() -> None:
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}
    config = tiny_config(MOT, depth={"image": table})
    decoder, batch = Decoder(config), random_batch(config)
    by_rank = decoder(build_inputs(batch, config))
    everything = decoder(build_inputs(batch, config, routing_state=RoutingState(causal=True)))
    nothing = decoder(
        build_inputs(
            batch,
            config,
            routing_state=RoutingState(
                causal=True, thresholds={f"blocks.{i}.depth.image": 99.0 for i in (0, 1)}
            ),
        )
    )
    assert not torch.equal(by_rank, everything) and not torch.equal(by_rank, nothing)
