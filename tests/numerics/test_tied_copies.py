"""The reduction identity of towers: MoT whose towers are copies of one another is the dense model."""

import pytest
import torch
from torch import Tensor

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close, cast
from tests.pretrain.models.random_batch import (
    DENSE,
    IMAGE_SPEECH_SHARED,
    MOT,
    random_batch,
    tiny_config,
    with_ids,
)


def run(
    config: ModelConfig, weights: dict[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(logits in sequence order, objective, gradients) with a shard's weights copied from the dense
    model's."""
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            layer, _, shard = name.rpartition(".")
            copied = next(n for n in (name, f"{layer}.all", f"{layer}.shared") if n in weights)
            parameter.copy_(weights[copied])
            assert shard != "all" or config.towers == DENSE
    batch = random_batch(config, sequences=3, seed=2)
    decoder, inputs = cast(decoder, build_inputs(batch, config), dtype)
    module = Pretraining(decoder)
    logits = decoder(inputs)[inputs.routing.to_sequence].detach()
    objective, *_ = module(inputs)
    objective.backward()
    return logits, objective.detach(), {name: p.grad for name, p in decoder.named_parameters()}


def weights_of(dense: ModelConfig) -> dict[str, Tensor]:
    """The weights of a dense model by name, other than at the start; a tied part of MoT is called shared, of
    dense all."""
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: parameter.detach() + 0.1 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in Decoder(dense).named_parameters()
    }
    return weights | {name.removesuffix(".all") + ".shared": weight for name, weight in weights.items()}


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("placement", ["post", "pre"])
@pytest.mark.parametrize(
    ("towers", "untied"),
    [
        (MOT, ["attention", "feed_forward", "norm"]),
        (IMAGE_SPEECH_SHARED, ["attention", "feed_forward", "norm"]),
        (MOT, ["attention"]),
        (MOT, ["feed_forward", "norm"]),
        (MOT, ["feed_forward", "qkv", "final_norm", "embedding"]),
        (IMAGE_SPEECH_SHARED, ["attention_out", "qk_norm", "block_norm", "head"]),
    ],
)
def test_mot_of_copies_is_dense(
    towers: dict[str, str], untied: list[str], placement: str, dtype: torch.dtype
) -> None:
    """Towers multiply the same rows in other groups."""
    dense_config = tiny_config(DENSE, norm_placement=placement, z_loss=0.01)
    weights = weights_of(dense_config)
    dense_logits, dense_objective, dense_grads = run(dense_config, weights, dtype)
    config = tiny_config(towers, norm_placement=placement, z_loss=0.01, untied=untied)
    logits, objective, grads = run(config, weights, dtype)
    assert_close(logits, dense_logits, "logits")
    assert_close(objective, dense_objective, "objective")
    for name, dense_grad in dense_grads.items():
        layer = name.rpartition(".")[0]
        of_towers = [grad for other, grad in grads.items() if other.rpartition(".")[0] == layer]
        assert_close(torch.stack(of_towers).sum(0), dense_grad, f"gradients of all towers of {layer}")


def test_fine_names_are_their_shorthands_bit_for_bit() -> None:
    coarse, fine = (
        tiny_config(MOT, untied=untied)
        for untied in (
            ["attention", "feed_forward", "norm"],
            ["block_norm", "qkv", "final_norm", "feed_forward", "qk_norm", "attention_out"],
        )
    )
    weights = weights_of(tiny_config(DENSE))
    logits, objective, grads = run(coarse, weights, torch.float32)
    fine_logits, fine_objective, fine_grads = run(fine, weights, torch.float32)
    assert list(grads) == list(fine_grads)
    assert torch.equal(logits, fine_logits) and torch.equal(objective, fine_objective)
    assert all(torch.equal(grad, fine_grads[name]) for name, grad in grads.items())


def test_an_embedding_per_tower_trains_as_one_for_all() -> None:
    """Where an id has one modality, as in data, a tower looks up the rows of its own ids alone."""
    shared = tiny_config(MOT)
    untied = tiny_config(MOT, untied=["attention", "feed_forward", "norm", "embedding"])
    batch = random_batch(shared, sequences=3, seed=2)
    batch = with_ids(batch, 10 * batch.input_modality + batch.input_ids % 10)
    found = []
    for config in (shared, untied):
        decoder, inputs = cast(Decoder(config, seed=3), build_inputs(batch, config), torch.float64)
        optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            Pretraining(decoder)(inputs)[0].backward()
            optimizer.step()
        found.append(decoder(inputs).detach())
    assert_close(found[1], found[0], "logits after three steps")


def test_a_tower_that_is_no_copy_is_far_from_dense() -> None:
    """One matrix of one of three towers is 1 % off."""
    dense, wide = tiny_config(DENSE), torch.float64
    weights, name = weights_of(dense), "blocks.0.attention.qkv.weight"
    logits, *_ = run(dense, weights, wide)
    off, *_ = run(tiny_config(MOT), weights | {f"{name}.image": 1.01 * weights[f"{name}.all"]}, wide)
    assert float((off - logits).abs().max()) > 100 * TOLERANCE[wide] * float(logits.abs().max())
