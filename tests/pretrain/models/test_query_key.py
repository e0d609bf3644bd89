import numpy as np
import pytest
import torch
from torch import Tensor

from parallel.routing import route
from parallel.towers import NormKind
from pretrain.models.query_key import NormRotate, rotary_table
from tests.pretrain.models.precision import PRECISIONS, assert_close

HEAD_DIM, HEADS, KV_HEADS = 8, 4, 2
COUNTS = (3, 0, 5)
TOWERS = ("text", "image", "speech")
ROUTING = route(np.array([0, 2, 2, 0, 2, 0, 2, 2], np.uint8), (0, 1, 2), 3)


def module(norm: NormKind | None, shards: tuple[str, ...] = TOWERS) -> NormRotate:
    made = NormRotate(HEAD_DIM, HEADS, KV_HEADS, shards, norm=norm, eps=1e-3)
    with torch.no_grad():
        for index, parameter in enumerate(made.parameters()):
            parameter.copy_(torch.linspace(0.5, 1.5 + index, 2 * HEAD_DIM))
    return made


def plain(made: NormRotate, qkv: Tensor, positions: Tensor) -> Tensor:
    """The same with autograd, step by step."""
    q, k, v = qkv.unflatten(1, (-1, HEAD_DIM)).split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    if made.shards:

        def per_row(of: torch.nn.ParameterDict) -> tuple[Tensor, Tensor]:
            pieces = [of[name].expand(n, -1) for name, n in zip(made.shards, COUNTS, strict=True)]
            for_q, for_k = torch.cat(pieces).unsqueeze(1).chunk(2, dim=-1)
            return for_q, for_k

        if made.bias is not None:
            q, k = (x - x.mean(-1, keepdim=True) for x in (q, k))
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * weight
            for x, weight in zip((q, k), per_row(made.weight), strict=True)
        )
        if made.bias is not None:
            q, k = (x + bias for x, bias in zip((q, k), per_row(made.bias), strict=True))
    angles = positions[:, None, None] * 100.0 ** (-torch.arange(0, HEAD_DIM, 2, dtype=qkv.dtype) / HEAD_DIM)

    def rotate(x: Tensor) -> Tensor:
        even, odd = x[..., 0::2], x[..., 1::2]
        turned = (even * angles.cos() - odd * angles.sin(), odd * angles.cos() + even * angles.sin())
        return torch.stack(turned, dim=-1).flatten(-2)

    return torch.cat((rotate(q), rotate(k), v), dim=1).flatten(1)[ROUTING.to_sequence]


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_equals_norm_then_rope_with_gradients(norm: NormKind | None, dtype: torch.dtype) -> None:
    made = module(norm).to(dtype)
    positions = torch.tensor([0, 1, 2, 0, 50, 2, 1, 3])
    qkv = torch.randn(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype, requires_grad=True)
    expected = plain(made, qkv, positions)
    out = made(qkv, ROUTING, rotary_table(positions, HEAD_DIM, 100.0, dtype))
    assert_close(out, expected, "queries, keys and values")
    grad = torch.randn_like(expected)
    of = (qkv, *made.parameters())
    wanted, got = torch.autograd.grad(expected, of, grad), torch.autograd.grad(out, of, grad)
    for number, (ours, theirs) in enumerate(zip(got, wanted, strict=True)):
        assert_close(ours, theirs, f"gradient {number}")
    for (name, _), gradient in zip(made.named_parameters(), got[1:], strict=True):
        assert gradient.any() == (not name.endswith(".image")), "the absent tower has a zero gradient"


def test_one_tower_stays_in_place() -> None:
    tied, untied = module("rms", ("shared",)), module("rms")
    qkv = torch.randn(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    rotary = rotary_table(torch.arange(8), HEAD_DIM, 100.0)
    one_tower = route(np.zeros(8, np.uint8), (0,), 1)
    in_place = tied(qkv, one_tower, rotary)
    assert torch.equal(tied(qkv, ROUTING, rotary), in_place[ROUTING.to_sequence])
    only_text = route(np.zeros(8, np.uint8), (0, 1, 2), 3)
    assert only_text.identity
    assert torch.equal(untied(qkv, only_text, rotary), in_place)  # the first shard has the same weight


@pytest.mark.parametrize("norm", ["rms", None])
def test_bf16_is_computed_in_fp32_and_rounded_once(norm: NormKind | None) -> None:
    made = module(norm)
    qkv = torch.randn(8, (HEADS + 2 * KV_HEADS) * HEAD_DIM).bfloat16()
    rotary = rotary_table(torch.arange(8), HEAD_DIM, 100.0)
    wide = made(qkv.float(), ROUTING, rotary)
    assert torch.equal(made(qkv, ROUTING, rotary), wide.bfloat16())


def test_angles_are_exact_at_far_positions() -> None:
    """fp32 holds a position of 2^20 exactly; bf16 would not hold 257."""
    table = rotary_table(torch.tensor([257, 2**20]), 4, 10_000.0)
    expected = torch.tensor([[257.0, 2.57], [2**20, 2**20 / 100]], dtype=torch.float64)
    # The smallest frequency is rounded to 24 bits: at 2^20 / 100 radians that is 1e-3.
    torch.testing.assert_close(
        table.squeeze(1).to(torch.complex128),
        torch.polar(torch.ones_like(expected), expected),
        rtol=0,
        atol=2e-3,
    )
