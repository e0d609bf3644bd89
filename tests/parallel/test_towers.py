from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from parallel import world
from parallel.collectives import ONE_RANK
from parallel.layout import ParallelConfig
from parallel.logical import logical_of
from parallel.precision import at_least_fp32
from parallel.testing import run_on_ranks
from parallel.towers import (
    TowerColumnParallelLinear,
    TowerEmbedding,
    TowerNorm,
    TowerRowParallelLinear,
)
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close

TOWERS = ("text", "image", "speech")  # not in alphabetical order
COUNTS = (3, 0, 5)
FP32, BF16 = TOLERANCE[torch.float32], 8e-3


def fill(seed: int) -> Callable[[Tensor, str], Tensor]:
    """Fills every shard alike, as towers.Initialise may."""
    return lambda weight, _: weight.normal_(generator=torch.Generator().manual_seed(seed))


def make_shards_differ(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.mul_(1 + index)


@pytest.mark.parametrize("kind", [TowerColumnParallelLinear, TowerRowParallelLinear])
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_each_tower_multiplies_its_own_slice(kind: type, dtype: torch.dtype) -> None:
    """Without torch.distributed: one process needs no groups."""
    assert not torch.distributed.is_initialized()
    layer = kind(4, 6, TOWERS, fill(0)).to(dtype)
    make_shards_differ(layer)
    x = torch.randn(8, 4, dtype=dtype, requires_grad=True)
    out = layer(x, COUNTS)
    weights = {name: layer.weight[name] for name in TOWERS}
    expected = torch.cat([F.linear(x[:3], weights["text"]), F.linear(x[3:], weights["speech"])])
    assert torch.equal(out, expected)

    grad = torch.randn(8, 6, dtype=dtype)
    wanted = torch.autograd.grad(expected, (x, weights["text"], weights["speech"]), grad)
    out.backward(grad)
    got = (x.grad, weights["text"].grad, weights["speech"].grad)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours is not None
        assert_close(ours, theirs, "gradient")
    absent = weights["image"].grad
    assert absent is not None and absent.shape == (6, 4) and not absent.any()


def draw_biases(module: torch.nn.Module) -> None:
    """Values in place of the zeros that biases start with."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.startswith("bias."):
                parameter.copy_(torch.linspace(-1, 1, parameter.shape[0]))


def test_each_tower_adds_its_own_bias() -> None:
    plain, layer = (TowerColumnParallelLinear(4, 6, TOWERS, fill(0), bias=b).double() for b in (False, True))
    x, grad = torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    assert torch.equal(layer(x, COUNTS), plain(x, COUNTS)), "biases start at zero"
    draw_biases(layer)
    make_shards_differ(layer)
    biases = torch.cat([layer.bias[t].expand(n, -1) for t, n in zip(TOWERS, COUNTS, strict=True)])
    with torch.no_grad():
        for name in TOWERS:
            plain.weight[name].copy_(layer.weight[name])
    out = layer(x, COUNTS)
    assert torch.equal(out, plain(x, COUNTS) + biases)
    out.backward(grad)
    for name, rows in zip(TOWERS, grad.split(COUNTS), strict=True):
        assert_close(layer.bias[name].grad, rows.sum(0), name, floor=1.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shards", [TOWERS, ("shared",)], ids=["towers", "shared"])
def test_parts_of_the_outputs_of_other_rows(shards: tuple[str, ...], bias: bool) -> None:
    layer = TowerColumnParallelLinear(4, 7, shards, fill(0), bias=bias).double()
    draw_biases(layer)
    make_shards_differ(layer)
    x = torch.randn(8, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([0, 2, 3, 6])
    found = layer.in_parts((x[rows], x, x), ((2, 0, 2), COUNTS, COUNTS), (2, 4, 1))
    whole = layer(x, COUNTS)
    wanted = (whole[rows, :2], whole[:, 2:6], whole[:, 6:])
    grads = [torch.randn_like(part) for part in wanted]
    inputs = (x, *layer.parameters())
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, "part")
    got = torch.autograd.grad(found, inputs, grads)
    for ours, theirs in zip(got, torch.autograd.grad(wanted, inputs, grads), strict=True):
        assert_close(ours, theirs, "gradient")


def test_a_frozen_tower_gets_no_gradient_and_the_input_still_does() -> None:
    layer = TowerColumnParallelLinear(4, 6, TOWERS, fill(0))
    layer.weight["text"].requires_grad_(False)
    x = torch.randn(8, 4, requires_grad=True)
    layer(x, COUNTS).sum().backward()
    assert layer.weight["text"].grad is None
    assert layer.weight["speech"].grad is not None
    assert x.grad is not None and x.grad[:3].any()


def test_a_tied_layer_takes_all_rows() -> None:
    layer = TowerColumnParallelLinear(4, 6, ("shared",), fill(0))
    x = torch.randn(8, 4)
    assert torch.equal(layer(x, COUNTS), F.linear(x, layer.weight["shared"]))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
def test_a_token_has_the_row_of_its_tower(dtype: torch.dtype) -> None:
    """An id may stand in the slices of several towers, and has another row in each."""
    embedding = TowerEmbedding(12, 4, TOWERS, fill(1)).to(dtype)
    make_shards_differ(embedding)
    ids = torch.tensor([0, 11, 4, 5, 4, 7, 7, 2])
    rows = embedding(ids, COUNTS)
    text, image, speech = (embedding.weight[name] for name in TOWERS)
    expected = torch.cat([text[ids[:3]], speech[ids[3:]]])
    assert torch.equal(rows, expected)
    grad = torch.randn(8, 4, dtype=dtype)
    wanted = torch.autograd.grad(expected, (text, speech), grad)
    rows.backward(grad)
    for ours, theirs in zip((text.grad, speech.grad), wanted, strict=True):
        assert ours is not None
        assert_close(ours, theirs, "gradient")
    assert image.grad is not None and not image.grad.any()


def test_parameters_are_named_by_shard_and_nothing_else_is_saved() -> None:
    for layer, kinds in (
        (TowerColumnParallelLinear(4, 6, TOWERS, fill(0)), ["weight"]),
        (TowerColumnParallelLinear(4, 6, TOWERS, fill(0), bias=True), ["weight", "bias"]),
        (TowerRowParallelLinear(4, 6, TOWERS, fill(0)), ["weight"]),
        (TowerNorm(4, TOWERS, 1e-5), ["weight"]),
        (TowerNorm(4, TOWERS, 1e-5, kind="layer"), ["weight", "bias"]),
    ):
        names = [f"{kind}.{name}" for kind in kinds for name in TOWERS]
        assert [name for name, _ in layer.named_parameters()] == names
        assert list(layer.state_dict()) == names
        layer.load_state_dict(layer.state_dict(), strict=True)


def test_initial_weights_are_the_callers() -> None:
    layer = TowerColumnParallelLinear(4, 6, TOWERS, fill(3))
    expected = torch.empty(6, 4).normal_(generator=torch.Generator().manual_seed(3))
    assert all(torch.equal(layer.weight[name], expected) for name in TOWERS)


@pytest.mark.parametrize("dtype", [*PRECISIONS, torch.bfloat16], ids=str)
def test_norm_equals_its_formula(dtype: torch.dtype) -> None:
    norm = TowerNorm(16, TOWERS, 1e-3).to(dtype)
    make_shards_differ(norm)
    x = torch.randn(8, 16, dtype=dtype, requires_grad=True)
    weights = [norm.weight[name] for name in TOWERS]
    rows = torch.cat([w.expand(n, -1) for w, n in zip(weights, COUNTS, strict=True)])
    rows, wide = at_least_fp32(rows), at_least_fp32(x)
    expected = wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * rows
    out = norm(x, COUNTS)
    assert out.dtype == dtype
    # bf16 rounds what is returned to its 8 bits, once.
    assert_close(at_least_fp32(out), expected, "norm", fp32=BF16 if dtype == torch.bfloat16 else FP32)

    grad = torch.randn(8, 16).to(dtype)
    wanted = torch.autograd.grad(expected, (x, *weights), at_least_fp32(grad))
    got = torch.autograd.grad(out, (x, *weights), grad)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert_close(at_least_fp32(ours), theirs, "gradient", fp32=BF16 if dtype == torch.bfloat16 else FP32)
    assert not got[2].any()


def gated_pair(size: int, sequence_parallel: bool, dtype: torch.dtype, more: bool) -> dict[str, Any]:
    """Embedding, norm, column-parallel gate and value, row-parallel layer: whole, or one rank's part."""
    tp = ONE_RANK
    if size > 1:
        tp = world.start(ParallelConfig(tp=size, sequence_parallel=sequence_parallel)).tensor_parallel
        assert tp.sequence_parallel == sequence_parallel
    embedding = TowerEmbedding(12, 4, TOWERS if more else ("shared",), fill(1), tp=tp).to(dtype)
    norm = TowerNorm(4, TOWERS, 1e-5, kind="layer" if more else "rms", tp=tp).to(dtype)
    up = TowerColumnParallelLinear(4, 16, TOWERS, fill(2), blocks=(8, 8), bias=more, tp=tp).to(dtype)
    down = TowerRowParallelLinear(8, 4, TOWERS, fill(3), tp=tp).to(dtype)
    draw_biases(norm)
    if up.bias is not None:
        with torch.no_grad():
            for parameter in up.bias.values():
                whole = torch.linspace(-1, 1, 16)
                parameter.copy_(logical_of(parameter).cut(whole, tp.rank, tp.size))
    for layer in (embedding, norm, up, down):
        make_shards_differ(layer)
    x = embedding(torch.tensor([0, 11, 4, 5, 3, 7, 7, 2]), COUNTS)
    normed = norm(x, COUNTS)
    gate, value = up(normed, COUNTS).chunk(2, dim=1)
    out = down(gate * value, COUNTS)
    for activation in (x, normed):
        activation.retain_grad()
    weight = torch.arange(32, dtype=dtype).view(8, 4)
    rows = slice(tp.rank * 8 // tp.size, (tp.rank + 1) * 8 // tp.size)
    (out * (weight[rows] if tp.sequence_parallel else weight)).sum().backward()
    parameters = [*embedding.parameters(), *up.parameters(), *down.parameters()]
    assert all(getattr(parameter, "tensor_model_parallel", False) for parameter in parameters)
    modules = {"embedding": embedding, "norm": norm, "up": up, "down": down}
    return {
        "rows": {"out": out.detach(), "grad_x": x.grad, "grad_normed": normed.grad},
        "grads": {
            f"{kind}.{name}": (parameter.grad, logical_of(parameter))
            for kind, module in modules.items()
            for name, parameter in module.named_parameters()
        },
    }


@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("more", [False, True], ids=["", "embedding per tower, LayerNorm, biases"])
def test_tensor_parallel_ranks_equal_one_process(
    more: bool, tp: int, sequence_parallel: bool, dtype: torch.dtype
) -> None:
    """Forward, input gradients, and every shard's gradient is its slice of the whole one."""
    whole = gated_pair(1, False, dtype, more)
    ranks = run_on_ranks(gated_pair, tp, tp, sequence_parallel, dtype, more)

    for name, expected in whole["rows"].items():
        rows = [rank["rows"][name] for rank in ranks]
        for got in [torch.cat(rows)] if sequence_parallel else rows:
            assert_close(got, expected, name)
    for name, (expected, logical) in whole["grads"].items():
        assert (logical.dim is None) == name.startswith("norm"), name
        for number, rank in enumerate(ranks):
            part = rank["grads"][name][0]
            assert_close(part, logical.cut(expected, number, tp), name, floor=float(expected.abs().max()))
