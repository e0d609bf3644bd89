"""Masks of dropout depend on seed, step, token, place and feature, and on nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_pipeline.stream.batch import Batch
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.dropout import DropoutDraw, StreamDropout, dropped
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from tests.numerics.naive_elements import is_dropped
from tests.pretrain.models.random_batch import DENSE, ELEMENTS, MOT, depth_tables, random_batch, tiny_config


@pytest.mark.parametrize("rate", [0.01, 0.5, 0.99])
def test_a_mask_is_what_pythons_integers_say(rate: float) -> None:
    tokens = torch.tensor([0, 1, 5, 2**33 + 7, 2**62 + 1])
    found = dropped(tokens, 37, rate, "3/0/blocks.1.attention")
    expected = [
        [is_dropped(token, feature, rate, "3/0/blocks.1.attention") for feature in range(37)]
        for token in tokens.tolist()
    ]
    assert found.tolist() == expected


def test_masks_of_other_seeds_steps_and_places_share_what_chance_does() -> None:
    """And a rate is kept by all features, and by all tokens, within five standard deviations."""
    tokens, features, rate = 4000, 64, 0.3
    names = ("1/0/blocks.1.attention", "2/0/blocks.1.attention", "1/1/blocks.1.attention",
             "1/0/blocks.2.attention", "1/0/blocks.1.feed_forward")  # fmt: skip
    masks = [dropped(torch.arange(tokens), features, rate, name).double() for name in names]
    for mask in masks:
        for dim, count in ((0, tokens), (1, features)):
            deviation = (rate * (1 - rate) / count) ** 0.5
            assert float((mask.mean(dim) - rate).abs().max()) < 5 * deviation
    both = (rate**2 * (1 - rate**2) / (tokens * features)) ** 0.5
    for mask in masks[1:]:
        assert float((mask * masks[0]).mean()) == pytest.approx(rate**2, abs=5 * both)
    # Neighbours, too: tokens and features one and two apart.
    for shift in (1, 2):
        for dim in (0, 1):
            shared = float((masks[0] * masks[0].roll(shift, dim)).mean())
            assert shared == pytest.approx(rate**2, abs=5 * both)


def test_what_is_kept_is_scaled_and_its_gradient_too() -> None:
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    out = StreamDropout(0.25, DropoutDraw(1, 2, range(1)), torch.arange(6))(x, "embedding")
    kept = ~dropped(torch.arange(6), 8, 0.25, "1/2/embedding")
    assert 0 < int(kept.sum()) < kept.numel()
    assert torch.equal(out, torch.where(kept, x * (1 / 0.75), 0.0))
    grad = torch.randn_like(x)
    (found,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(found, torch.where(kept, grad * (1 / 0.75), 0.0))


def _joined(batches: list[Batch]) -> Batch:
    arrays = {
        name: np.concatenate([getattr(batch, name) for batch in batches])
        for name, value in vars(batches[0]).items()
        if isinstance(value, np.ndarray)
    }
    return Batch(**arrays, samples=tuple(name for batch in batches for name in batch.samples))


@pytest.mark.parametrize("depth", [False, True], ids=["", "depth"])
def test_a_cut_into_micro_batches_changes_no_mask(depth: bool) -> None:
    """Sequences 0, 2 and 1, 3 of a step, as two data-parallel ranks have them, and one by one."""
    routed = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k"}
    config = tiny_config(MOT, **ELEMENTS, **(depth_tables(MOT, **routed) if depth else {}))
    sequences = [random_batch(config, sequences=1, seed=seed, padding_tokens=seed) for seed in range(4)]
    module = Pretraining(Decoder(config, seed=5)).double()

    def gradients(cut: list[range]) -> tuple[float, list[torch.Tensor]]:
        module.zero_grad()
        total = 0.0
        for numbers in cut:
            inputs = build_inputs(_joined([sequences[number] for number in numbers]), config)
            draw = DropoutDraw(seed=1, step=9, sequences=numbers)
            inputs = replace(inputs, dropout=draw, loss_weights=inputs.loss_weights.double())
            objective, *_ = module(inputs)
            objective.backward()
            total += float(objective.detach())
        return total, [p.grad.clone() for p in module.parameters() if p.grad is not None]

    whole, expected = gradients([range(4)])
    for cut in ([range(0, 4, 2), range(1, 4, 2)], [range(i, i + 1) for i in (3, 1, 0, 2)]):
        found, grads = gradients(cut)
        assert found == pytest.approx(whole, rel=1e-12)
        for ours, theirs in zip(grads, expected, strict=True):
            assert float((ours - theirs).abs().max()) <= 1e-11 * max(1.0, float(theirs.abs().max()))


def objective(config: ModelConfig, draw: DropoutDraw | None, *, training: bool = True) -> float:
    inputs = replace(build_inputs(random_batch(config), config), dropout=draw)
    found, *_ = Pretraining(Decoder(config, seed=5)).train(training)(inputs)
    return float(found)


def test_a_step_a_seed_and_a_sequence_draw_anew_and_an_evaluation_draws_nothing() -> None:
    config = tiny_config(MOT, dropout=0.2)
    plain = objective(tiny_config(MOT), None)
    draws = [
        (1, 1, range(2)),
        (2, 1, range(2)),
        (1, 2, range(2)),
        (1, 1, range(1, 3)),
        (1, 1, range(0, 4, 2)),
    ]
    drawn = [objective(config, DropoutDraw(*draw)) for draw in draws]
    assert len({plain, *drawn}) == len(draws) + 1
    assert objective(config, DropoutDraw(*draws[0])) == drawn[0]
    assert objective(config, None, training=False) == plain
    assert objective(config, DropoutDraw(*draws[0]), training=False) == plain


def test_a_training_step_without_a_draw_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="do not say which masks"):
        objective(tiny_config(DENSE, embedding_dropout=0.1), None)
