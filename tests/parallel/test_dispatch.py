import pytest
import torch
from torch.nn import functional as F

from parallel import dispatch as dispatched
from parallel.collectives import TensorParallel
from parallel.dispatch import DispatchedLinear, ExpertAssignment, collect, dispatch, grouped
from parallel.logical import LogicalTensor, logical_of
from tests.pretrain.models.precision import assert_close

ROWS, COUNTS = [4, 0, 0, 2, 4, 1], (2, 0, 4)
"""Of 5 rows: row 3 goes nowhere, 0 and 4 to two experts, the second of three experts takes nothing."""


def taken(on_device: bool = False) -> ExpertAssignment:
    rows = torch.tensor(ROWS)
    ends = torch.tensor(COUNTS).cumsum(0).to(torch.int32)
    return (
        ExpertAssignment((rows,), ends, None)
        if on_device
        else ExpertAssignment(rows.split(COUNTS), ends, COUNTS)
    )


@pytest.mark.parametrize("on_device", [False, True])
def test_rows_go_to_their_experts_and_what_comes_back_is_added(on_device: bool) -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    by = taken(on_device)
    assert torch.equal(dispatch(x, by), x[ROWS])
    y = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    matrix = F.one_hot(torch.tensor(ROWS), 5).double()
    assert_close(collect(y, by, 5), matrix.t() @ y, "sums")
    assert torch.autograd.gradcheck(lambda x: dispatch(x, by), (x,))
    assert torch.autograd.gradcheck(lambda y: collect(y, by, 5), (y,))


def layer() -> DispatchedLinear:
    shapes = {"plain": LogicalTensor((8, 16), 0), "split": LogicalTensor((3, 8, 16), 1)}
    return DispatchedLinear(shapes, lambda w, _: w.normal_(generator=torch.Generator().manual_seed(w.ndim)))


@pytest.mark.parametrize("on_device", [False, True], ids=["loop", "grouped"])
def test_products_are_those_of_each_expert(on_device: bool) -> None:
    """The grouped product, which a GPU takes in bf16, is computed here by torch's CPU form of it."""
    dtype = torch.float32 if on_device else torch.float64  # torch has no grouped product in fp64
    linear, plain = layer().to(dtype), torch.randn(2, 16, dtype=dtype)
    rows = torch.randn(6, 16, dtype=dtype, requires_grad=True)
    ours = linear((plain, rows), (None, taken(on_device)))
    weight = linear.weight["split"]
    expert_of = [0, 0, 2, 2, 2, 2]
    expected = torch.stack([weight[e] @ row for e, row in zip(expert_of, rows, strict=True)])
    assert torch.equal(ours[0], F.linear(plain, linear.weight["plain"]))
    assert_close(ours[1], expected, "products")

    grad = torch.randn(6, 8, dtype=dtype)
    wanted = torch.autograd.grad(expected, (rows, weight), grad)
    found = torch.autograd.grad(ours[1], (rows, weight), grad)
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, "gradient")
    assert not found[1][1].any()  # zeros, not None, for the expert that took nothing


def test_a_grouped_product_is_for_gpus_in_bf16() -> None:
    assert not grouped(torch.zeros(1, dtype=torch.bfloat16)) and not grouped(torch.zeros(1))
    assert dispatched.F.grouped_mm is F.grouped_mm


def test_a_rank_holds_its_part_of_every_expert() -> None:
    group = object()  # never spoken to
    tp = TensorParallel(1, 2, group)  # type: ignore[arg-type]
    whole = torch.arange(3 * 8 * 4.0).view(3, 8, 4)
    columns = DispatchedLinear({"a": LogicalTensor((3, 8, 4), 1, (4, 4))}, lambda w, _: w.copy_(whole), tp=tp)
    part = columns.weight["a"]
    assert torch.equal(part, whole[:, [2, 3, 6, 7]])
    assert logical_of(part).shape == (3, 8, 4) and part.tensor_model_parallel
    rows = DispatchedLinear({"a": LogicalTensor((3, 8, 4), 2)}, lambda w, _: w.copy_(whole), tp=tp)
    assert torch.equal(rows.weight["a"], whole[..., 2:])
