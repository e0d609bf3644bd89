"""One expert is none; what is causal is; recomputation changes nothing."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.routing_state import RoutingState
from pretrain.train.expert_steps import share_targets
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close, cast
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch, tiny_config

TOKEN = {"num_experts": 4, "routing": "token_choice", "top_k": 2}
EXPERT = {"num_experts": 4}


def run(
    config: ModelConfig,
    batch: Batch,
    routing_state: RoutingState | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits in sequence order, objective, gradients) of a model in `dtype`."""
    inputs = build_inputs(batch, config, routing_state=routing_state)
    decoder, inputs = cast(Decoder(config, seed=3, **options), inputs, dtype)
    logits = decoder(inputs)[inputs.routing.to_sequence].detach()
    objective, *_ = Pretraining(decoder)(inputs)
    objective.backward()
    found = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    assert len(found) == len(list(decoder.parameters()))
    return logits, objective.detach(), found


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
def test_one_expert_is_none(towers: dict[str, str], routing: str, placement: str, dtype: torch.dtype) -> None:
    plain = tiny_config(towers, norm_placement=placement)
    tower = plain.tower_names[0]
    with_one = tiny_config(
        towers, norm_placement=placement, experts={tower: {"num_experts": 1, "routing": routing}}
    )
    # Padding is no token of an expert: its rows differ, and nobody looks at them.
    batch = random_batch(plain, sequences=3, seed=2)
    filled = torch.from_numpy(batch.document_ids.reshape(-1) >= 0)
    logits, objective, grads = run(with_one, batch, dtype=dtype)
    plain_logits, plain_objective, plain_grads = run(plain, batch, dtype=dtype)
    assert_close(logits[filled], plain_logits[filled], "logits")
    assert_close(objective, plain_objective, "objective")
    for name, grad in grads.items():
        if ".router." in name:
            assert not grad.any(), name  # a choice of one from one
        else:
            assert_close(grad.view_as(plain_grads[name]), plain_grads[name], name)


@pytest.mark.parametrize("routing", ["expert_choice", "token_choice"])
def test_two_experts_are_far_from_none(routing: str) -> None:
    plain = tiny_config(DENSE, norm_placement="pre")
    batch = random_batch(plain, sequences=3, seed=2)
    two = tiny_config(DENSE, norm_placement="pre", experts={"all": {"num_experts": 2, "routing": routing}})
    objectives = [float(run(config, batch, dtype=torch.float64)[1]) for config in (plain, two)]
    assert abs(objectives[1] / objectives[0] - 1) > 100 * TOLERANCE[torch.float32]


def change_after(batch: Batch, config: ModelConfig, slot: int) -> Batch:
    """Other ids in all slots of each sequence behind `slot`; modalities and documents stay."""
    ids = copy.copy(batch.input_ids)
    rng = np.random.default_rng(9)
    later = np.arange(config.context_tokens) > slot
    ids[:, later] = rng.integers(1, config.vocab_tokens, ids[:, later].shape)
    return replace(batch, input_ids=ids)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("experts", "causal"), [(TOKEN, True), (EXPERT, False), ({**EXPERT, "capacity_factor": 4}, True)]
)
def test_later_tokens_change_no_logit_under_token_choice_and_do_under_expert_choice(
    experts: dict[str, Any], causal: bool, packed: bool
) -> None:
    """Experts that take everything choose nothing: the difference is the choice and nothing else."""
    config = tiny_config(DENSE, context_tokens=32, experts={"all": experts})
    batch = random_batch(
        config, sequences=2, document_tokens=(2, 8) if packed else (32, 32), padding_tokens=0
    )
    slot = 15
    before, *_ = run(config, batch, dtype=torch.float64)
    after, *_ = run(config, change_after(batch, config, slot), dtype=torch.float64)
    assert before.shape == (64, 40)
    seen = (before.view(2, 32, 40) - after.view(2, 32, 40))[:, : slot + 1].abs().max()
    later = (before.view(2, 32, 40) - after.view(2, 32, 40))[:, slot + 1 :].abs().max()
    assert later > 0.1
    # As below.
    assert (seen < 1e-10) if causal else (seen > 1e-3), float(seen)


@pytest.mark.parametrize("packed", [True, False])
def test_later_tokens_change_no_logit_by_thresholds(packed: bool) -> None:
    """The causal form of expert choice, with thresholds that let about a third through."""
    config = tiny_config(MOT, context_tokens=32, experts={"text": EXPERT, "image": EXPERT})
    batch = random_batch(
        config, sequences=2, document_tokens=(2, 8) if packed else (32, 32), padding_tokens=0
    )
    by_thresholds = RoutingState(causal=True, thresholds=dict.fromkeys(share_targets(config), -1.1))
    before, objective, _ = run(config, batch, by_thresholds, dtype=torch.float64)
    after, *_ = run(config, change_after(batch, config, 15), by_thresholds, dtype=torch.float64)
    seen, later = (before - after).view(2, 32, 40).abs().split([16, 16], dim=1)
    # An expert with another number of rows may sum in another order: 1e-15 in fp64.
    assert seen.max() < 1e-10 and later.max() > 0.1
    for others in (RoutingState(), RoutingState(causal=True)):
        other = run(config, batch, others, dtype=torch.float64)[1]
        assert abs(float(objective - other)) > 1e-6 * float(other)


@pytest.mark.parametrize("experts", [{**TOKEN, "load_balance": 0.1, "router_z": 0.1}, EXPERT])
def test_recomputation_changes_nothing(experts: dict[str, Any]) -> None:
    config = tiny_config(MOT, experts={"text": experts})
    batch = random_batch(config, sequences=3, seed=4)
    _, objective, grads = run(config, batch)
    _, again, recomputed = run(config, batch, activation_checkpointing=True)
    assert torch.equal(objective, again)
    for name, grad in grads.items():
        assert torch.equal(grad, recomputed[name]), name
