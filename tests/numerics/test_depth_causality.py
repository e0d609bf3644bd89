"""Which tokens a change reaches: under the threshold rule none before it, under the papers' rule others do.
And that thresholds let through the share that was asked for."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from pretrain.metrics import RouterSums, add_by_router
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from pretrain.optimizer_config import OptimizerConfig
from pretrain.train.depth_steps import router_sums, routers, row, thresholds_after
from pretrain.train.optimizer import parameter_groups
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.models.precision import TOLERANCE
from tests.pretrain.models.random_batch import (
    DENSE,
    MOT,
    depth_tables,
    random_batch,
    tiny_config,
    with_ids,
)

CONTEXT = 24
ROUNDING = TOLERANCE[torch.float64]
PLACES = [{"keys": "all"}, {"keys": "selected"}, {"parts": "feed_forward"}]


def config(towers: dict[str, str], **depth: Any) -> ModelConfig:
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold", **depth}
    return tiny_config(
        towers, context_tokens=CONTEXT, num_layers=3, **depth_tables(("text", "image"), **table)
    )


def changed_after(batch: Batch, place: int) -> Batch:
    """Other ids and modalities after `place` of every sequence; documents stay."""
    other = random_batch(tiny_config(MOT, context_tokens=CONTEXT), sequences=2, seed=77, padding_tokens=0)
    fields = {}
    for name in ("input_ids", "input_modality", "input_special"):
        values = getattr(batch, name).copy()
        values[:, place + 1 :] = getattr(other, name)[:, place + 1 :]
        fields[name] = values
    return replace(batch, **fields)


def reached(
    model: ModelConfig, packed: bool, routing_state: RoutingState, document_mask: bool = True
) -> bool:
    """Whether a change of later tokens changes a logit before it, in fp64, at any of some places. The sorted
    stream has other lengths, so products may round otherwise."""
    lengths = (5, 9) if packed else (CONTEXT, CONTEXT)
    batch = random_batch(model, seed=3, document_tokens=lengths, padding_tokens=0)
    decoder = perturbed(model).double()

    def logits(of: Batch) -> torch.Tensor:
        inputs = build_inputs(of, model, routing_state=routing_state, document_mask=document_mask)
        return decoder(inputs)[inputs.routing.to_sequence].unflatten(0, (2, CONTEXT))

    found = []
    with torch.no_grad():
        before = logits(batch)
        for place in (3, 11, 18):
            changed = (before - logits(changed_after(batch, place))).abs()
            assert changed[:, place + 1 :].max() > 0.1
            found.append(float(changed[:, : place + 1].max()))
    # Rounding or a change: nothing is between.
    assert not any(ROUNDING < each < 1e6 * ROUNDING for each in found), found
    return max(found) > ROUNDING


THRESHOLDS = {f"blocks.{layer}.depth.{m}": 0.01 for layer in range(3) for m in ("text", "image")}


@pytest.mark.pairwise
@pytest.mark.parametrize(
    ("packed", "document_mask"),
    [(True, True), (True, False), (False, True)],
    ids=["packed", "across_documents", "one_document"],
)
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_under_thresholds_no_token_sees_a_later_one(
    place: dict[str, str], towers: dict[str, str], packed: bool, document_mask: bool
) -> None:
    model = config(towers, **place)
    assert model.is_causal
    assert not reached(model, packed, RoutingState(thresholds=THRESHOLDS), document_mask)


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_without_document_mask_attention_crosses_documents_but_not_sequences(place: dict[str, str]) -> None:
    model = config(MOT, **place)
    batch = random_batch(model, seed=3, document_tokens=(5, 9), padding_tokens=0)
    decoder = perturbed(model).double()
    first = (np.arange(2)[:, None] == 0) & (batch.document_ids == 0)
    other = with_ids(batch, np.where(first, (batch.input_ids + 7) % 39 + 1, batch.input_ids))

    def logits(of: Batch) -> torch.Tensor:
        inputs = build_inputs(
            of, model, routing_state=RoutingState(thresholds=THRESHOLDS), document_mask=False
        )
        return decoder(inputs)[inputs.routing.to_sequence].unflatten(0, (2, CONTEXT))

    with torch.no_grad():
        changed = ((logits(other) - logits(batch)).abs() > ROUNDING).any(dim=-1)
    # A later token that skips every block sees nothing.
    assert changed[0, batch.document_ids[0] > 0].float().mean() > 0.5 and not changed[1].any()


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("changes", [{"rule": "top_k"}, {"gate": "softmax"}], ids=str)
def test_the_papers_rule_and_softmax_look_ahead(place: dict[str, str], changes: dict[str, str]) -> None:
    model = config(MOT, **place, **changes)
    assert not model.is_causal
    assert reached(model, False, RoutingState(thresholds=THRESHOLDS))
    if "rule" in changes:  # and its causal form does not
        assert not reached(model, False, RoutingState(causal=True, thresholds=THRESHOLDS))


def test_realised_ratios_are_those_wanted_on_shifted_data_too() -> None:
    """Before the data changes to other ids in the middle, and again soon after, the mean ratio of each router
    is within 1 % of the wanted one. Means of 35 steps of some 12,000 tokens, so 0.4 % is their noise."""
    table = {
        "schedule": "linear", "mean_ratio": 0.6, "dense_above": 1.0, "min_ratio": 0.3, "rule": "threshold",
        "dense_frac": 0.03, "ramp_frac": 0.07,
    }  # fmt: skip
    model = tiny_config(
        DENSE, num_layers=2, context_tokens=128, vocab_tokens=2048, init_std=0.1, depth={"image": table}
    )
    module = Pretraining(Decoder(model, seed=1))
    groups = parameter_groups(
        module.named_parameters(), OptimizerConfig.model_validate({"learning_rate": 1.0}), model
    )
    optimizer = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=3e-4)
    half, steps = 50, 100
    thresholds, shares = {}, {}
    windows: dict[int, RouterSums] = {half: {}, steps: {}}
    for step in range(steps):
        batch = random_batch(model, sequences=8, seed=step, document_tokens=(20, 120), padding_tokens=0)
        # All ids are of plain tokens: in the first half of the steps the lower 1000, then the upper.
        ids = 7 + np.random.default_rng(step).integers(0, 1000, batch.input_ids.shape)
        batch = with_ids(batch, ids + 1000 * (step >= half))
        routing_state = RoutingState(thresholds=thresholds, progress=step / steps)
        inputs = build_inputs(batch, model, routing_state=routing_state)
        objective, _, report = module(inputs)
        optimizer.zero_grad()
        (objective / inputs.weight).backward()
        optimizer.step()
        thresholds, shares = thresholds_after(
            thresholds, shares, report, model, step=step + 1, num_steps=steps
        )
        for end, window in windows.items():
            if end - 35 <= step < end:
                window |= add_by_router(window, router_sums(model, report))
    for window in windows.values():
        found = row(model, window)
        for layer, modality, wanted in routers(model).values():
            assert found[f"depth/ratio/{modality}/{layer}"] == pytest.approx(wanted, abs=0.01)
