import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from parallel.precision import at_least_fp32
from pretrain.models.cross_entropy import CHUNK_TOKENS, linear_cross_entropy, sums_per_modality
from tests.pretrain.models.precision import PRECISIONS, assert_close


def inputs(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, 50, (tokens,), generator=generator)
    loss_weights = torch.rand(tokens, generator=generator).to(torch.promote_types(dtype, torch.float32))
    loss_weights[::7] = 0.0
    return hidden, weight, targets, loss_weights


def whole(hidden: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor, z_loss: float) -> tuple:
    logits = at_least_fp32(hidden) @ at_least_fp32(weight).t()
    nll = F.cross_entropy(logits, targets, reduction="none")
    return (loss_weights * (nll + z_loss * logits.logsumexp(-1).square())).sum(), nll


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("tokens", [1, CHUNK_TOKENS, 2 * CHUNK_TOKENS + 3])
def test_chunks_equal_whole_logits(tokens: int, z_loss: float, dtype: torch.dtype) -> None:
    hidden, weight, targets, loss_weights = inputs(tokens, dtype)
    expected, expected_nll = whole(hidden, weight, targets, loss_weights, z_loss)
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    objective, nll = linear_cross_entropy(hidden, [weight], [tokens], targets, loss_weights, z_loss)
    assert not nll.requires_grad
    got = torch.autograd.grad(3 * objective, (hidden, weight))
    assert_close(objective, expected, "objective")
    assert_close(nll, expected_nll, "nll")
    for name, ours, theirs in zip(("hidden", "weight"), got, wanted, strict=True):
        assert_close(ours, theirs, name)
    assert not got[0][::7].any(), "a token of weight 0 has no gradient"


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_towers_predict_with_their_own_weights(dtype: torch.dtype) -> None:
    """The second of three towers is absent; the others end inside a chunk."""
    sizes = (CHUNK_TOKENS + 3, 0, 7)
    hidden, weight, targets, loss_weights = inputs(sum(sizes), dtype)
    weights = [(scale * weight.detach()).requires_grad_() for scale in (1.0, 2.0, 0.5)]
    pieces = zip(*(each.split(sizes) for each in (hidden, targets, loss_weights)), weights, strict=True)
    found = [whole(x, own, ids, shares, 0.01) for x, ids, shares, own in pieces]
    expected = sum(objective for objective, _ in found)
    wanted = torch.autograd.grad(3 * expected, (hidden, *weights))
    objective, nll = linear_cross_entropy(hidden, weights, sizes, targets, loss_weights, 0.01)
    got = torch.autograd.grad(3 * objective, (hidden, *weights))
    assert_close(objective, expected, "objective")
    assert_close(nll, torch.cat([each for _, each in found]), "nll")
    for ours, theirs in zip(got, wanted, strict=True):
        assert_close(ours, theirs, "gradient")
    assert not got[2].any()


def test_bf16_sums_chunks_in_fp32() -> None:
    hidden, weight, targets, loss_weights = inputs(3 * CHUNK_TOKENS, torch.bfloat16)
    expected, _ = whole(hidden, weight, targets, loss_weights, 0.0)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    objective, _ = linear_cross_entropy(hidden, [weight], [len(hidden)], targets, loss_weights)
    got = torch.autograd.grad(objective, (hidden, weight))
    assert objective.dtype == torch.float32
    # Logits round to bf16's 8 bits once: 2e-4 measured on the sum, 6e-3 of the largest entry on gradients.
    torch.testing.assert_close(objective, expected, rtol=1e-3, atol=0)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-2 * float(theirs.abs().max()))


def test_frozen_head_and_no_grad() -> None:
    hidden, weight, targets, loss_weights = inputs(5)
    weight.requires_grad_(False)
    objective, _ = linear_cross_entropy(hidden, [weight], [len(hidden)], targets, loss_weights)
    objective.backward()
    assert weight.grad is None and hidden.grad is not None
    with torch.no_grad():
        again, _ = linear_cross_entropy(hidden, [weight], [len(hidden)], targets, loss_weights)
    assert torch.equal(again, objective)
    assert not again.requires_grad


@pytest.mark.parametrize(("training", "products"), [(False, 1), (True, 3)])
def test_an_evaluation_makes_no_gradients(training: bool, products: int) -> None:
    hidden, weight, targets, loss_weights = inputs(CHUNK_TOKENS + 1)
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        linear_cross_entropy(hidden, [weight], [len(hidden)], targets, loss_weights)
    assert counter.get_total_flops() == products * 2 * hidden.numel() * weight.shape[0]


def test_large_logits_do_not_overflow() -> None:
    hidden, weight = torch.full((2, 1), 1e4, requires_grad=True), torch.tensor([[1.0], [-1.0], [0.5]])
    objective, nll = linear_cross_entropy(hidden, [weight], [2], torch.tensor([0, 1]), torch.ones(2))
    assert nll.tolist() == [0.0, 2e4]
    objective.backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()


def test_sums_per_modality() -> None:
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert sums_per_modality(torch.tensor([3.0, 5.0, 8.0]), weights).tolist() == [7.0, 10.0, 0.0]
