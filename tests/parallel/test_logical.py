"""Cutting and joining logical tensors."""

import pytest
import torch
from torch import nn

from parallel.logical import LogicalTensor, logical_of, mark


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    "logical",
    [
        LogicalTensor((8, 3)),
        LogicalTensor((8, 3), 0),
        LogicalTensor((3, 8), 1),
        LogicalTensor((16, 3), 0, (8, 4, 4)),
    ],
)
def test_join_undoes_cut(logical: LogicalTensor, size: int) -> None:
    whole = torch.arange(torch.Size(logical.shape).numel()).view(logical.shape)
    parts = [logical.cut(whole, rank, size) for rank in range(size)]
    assert all(part.shape == logical.cut_shape(size) for part in parts)
    assert torch.equal(logical.join(parts), whole)


def test_every_block_is_cut_by_itself() -> None:
    rows = torch.arange(8).view(8, 1)
    part = LogicalTensor((8, 1), 0, (4, 2, 2)).cut(rows, 1, 2)
    assert part.flatten().tolist() == [2, 3, 5, 7]


def test_an_unmarked_parameter_is_whole_everywhere() -> None:
    parameter = nn.Parameter(torch.zeros(4, 2))
    assert logical_of(parameter) == LogicalTensor((4, 2))
    wider = LogicalTensor((8, 2), 0)
    assert logical_of(mark(parameter, wider)) == wider


def test_a_parameter_whose_values_zero_3_has_taken_away_keeps_its_shape() -> None:
    parameter = nn.Parameter(torch.empty(0))
    parameter.ds_shape = torch.Size((5, 3))  # type: ignore[attr-defined]  # as DeepSpeed 0.19.8 leaves it
    assert logical_of(parameter) == LogicalTensor((5, 3))
