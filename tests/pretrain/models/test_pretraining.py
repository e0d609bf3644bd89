import dataclasses

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pretrain.models import modality_sums
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.pretrain.models.precision import PRECISIONS, assert_close, cast
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_objective_and_stats_are_sums_over_tokens(dtype: torch.dtype) -> None:
    config = tiny_config(MOT, z_loss=0.05)
    batch = random_batch(config)
    weights = np.random.default_rng(0).random(batch.loss_weights.shape, np.float32) * batch.loss_weights
    weighted = dataclasses.replace(batch, loss_weights=weights)
    decoder, inputs = cast(Decoder(config), build_inputs(weighted, config), dtype)
    objective, stats, _ = Pretraining(decoder)(inputs)
    logits = decoder(inputs)
    nll = F.cross_entropy(logits, inputs.target_ids, reduction="none")
    token_weights = inputs.loss_weights.sum(dim=0)
    expected = (token_weights * (nll + 0.05 * logits.logsumexp(-1).square())).sum()
    assert_close(objective, expected, "objective")
    assert not stats.requires_grad
    targets = modality_sums.unpack(stats.tolist(), config.modalities)
    nats = torch.tensor([targets[m].nats for m in config.modalities], dtype=dtype)
    assert_close(nats, inputs.loss_weights @ nll, "nats")
    weights = [targets[m].weight for m in config.modalities]
    np.testing.assert_allclose(weights, inputs.weight_per_modality, rtol=1e-6)


def test_weights_of_modalities_act_on_the_objective_alone() -> None:
    config = tiny_config(MOT)
    batch = random_batch(config)
    decoder = Decoder(config)

    def of(weights: tuple[float, ...] | None) -> tuple[float, list[float], float]:
        inputs = build_inputs(batch, config, modality_weights=weights).to("cpu")
        objective, stats, _ = Pretraining(decoder)(inputs)
        return objective.item(), stats.tolist(), inputs.weight

    objective, stats, weight = of(None)
    assert of((1.0, 1.0, 1.0)) == (objective, stats, weight)
    halved, unweighted, half = of((0.5, 0.5, 0.5))  # powers of two round nothing
    assert (2 * halved, unweighted, 2 * half) == (objective, stats, weight)
    images, unweighted, count = of((0.0, 1.0, 0.0))
    targets = modality_sums.unpack(stats, config.modalities)
    assert unweighted == stats and count == targets["image"].weight
    assert images == pytest.approx(targets["image"].nats, rel=1e-6)  # fp32, sums in another order


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_two_micro_batches_sum_to_one_of_both(dtype: torch.dtype) -> None:
    config = tiny_config(MOT)
    module = Pretraining(Decoder(config))
    batches = [random_batch(config, sequences=2, seed=seed) for seed in (1, 2)]
    joined = dataclasses.replace(
        batches[0],
        samples=(*batches[0].samples, *batches[1].samples),
        **{
            field.name: np.concatenate([getattr(batch, field.name) for batch in batches])
            for field in dataclasses.fields(batches[0])
            if field.name not in ("samples", "vectors")
        },
    )

    def run(*of) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        module.zero_grad()
        results = [module(cast(module.decoder, build_inputs(batch, config), dtype)[1]) for batch in of]
        objective = torch.stack([result[0] for result in results]).sum()
        objective.backward()
        stats = torch.stack([result[1] for result in results]).sum(0)
        return objective.detach(), stats, [p.grad.clone() for p in module.parameters()]  # type: ignore[union-attr]

    (one, one_stats, one_grads), (two, two_stats, two_grads) = run(joined), run(*batches)
    assert_close(one, two, "objective")
    assert_close(one_stats, two_stats, "stats")
    for (name, _), ours, theirs in zip(module.named_parameters(), one_grads, two_grads, strict=True):
        assert_close(ours, theirs, name)


def test_an_absent_modality_has_zero_gradients_not_none() -> None:
    config = tiny_config(MOT)
    module = Pretraining(Decoder(config))
    module(build_inputs(random_batch(config, present=(0,)), config))[0].backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith((".image", ".speech")):
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.any(), name


def test_a_batch_of_padding_has_zero_objective_and_gradients() -> None:
    config = tiny_config(MOT)
    batch = random_batch(config)
    empty = dataclasses.replace(
        batch,
        document_ids=np.full_like(batch.document_ids, -1),
        loss_weights=np.zeros_like(batch.loss_weights),
    )
    module = Pretraining(Decoder(config))
    inputs = build_inputs(empty, config)
    objective, stats, _ = module(inputs)
    objective.backward()
    assert inputs.weight == 0 and objective.item() == 0 and not stats.any()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
