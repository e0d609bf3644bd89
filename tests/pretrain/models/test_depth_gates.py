"""Scores and gates against their definitions, and the gradients written by hand against autograd's."""

import pytest
import torch

from pretrain.models.depth_config import DepthConfig
from pretrain.models.depth_gates import gates, scores
from tests.pretrain.models.precision import assert_close


def depth(gate: str) -> DepthConfig:
    return DepthConfig.model_validate(
        {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k", "gate": gate}
    )


def test_scores_are_free_of_the_streams_scale() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(9, 16, generator=generator).double(),
        torch.randn(16, generator=generator).double(),
    )
    assert_close(scores(100 * x, weight, 1e-12), scores(x, weight, 1e-12), "scores")


@pytest.mark.parametrize(
    ("rows", "dtype"), [(0, torch.float64), (5, torch.float64), (5, torch.float32)], ids=str
)
def test_gradients_of_scores(rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = torch.linspace(-1, 1, 8, dtype=dtype)
    grads = []
    for by_hand in (True, False):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        found = scores(a, b, 1e-5) if by_hand else a @ b * (a.square().mean(-1) + 1e-5).rsqrt() / 8
        (found * torch.arange(rows)).sum().backward()
        assert a.grad is not None and b.grad is not None
        grads.append((found.detach(), a.grad, b.grad))
    for ours, autograds in zip(*grads, strict=True):
        assert ours.shape == autograds.shape
        if ours.numel():
            assert_close(ours, autograds, "scores or gradient", floor=1e-12)


def test_scores_of_bf16_are_fp32() -> None:
    x = torch.randn(4, 8).bfloat16().requires_grad_()
    found = scores(x, torch.ones(8).bfloat16(), 1e-5)
    found.sum().backward()
    assert found.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.bfloat16


def test_gates() -> None:
    r = torch.tensor([0.0, 1.0, -30.0])
    documents = torch.tensor([0, 0, 1])
    found = {g: gates(depth(g), r, documents).tolist() for g in ("tanh", "sigmoid", "none")}
    assert found["tanh"] == pytest.approx([1.0, 1 + 0.2 * 0.7615942, 0.8])
    assert found["sigmoid"] == pytest.approx([0.5, 0.7310586, 0.0], abs=1e-6)
    assert found["none"] == [1.0, 1.0, 1.0]
    softmax = gates(depth("softmax"), r, documents)
    assert softmax.tolist() == pytest.approx([0.2689414, 0.7310586, 1.0])
    assert torch.equal(gates(depth("shifted_softmax"), r, documents), 1 + softmax)
