"""Digests: additive over every way to cut a tensor, changed by every bit and every place."""

from dataclasses import replace

import pytest
import torch

from parallel.digest import MODULUS, digests, logical_index
from parallel.fragments import Fragment
from parallel.logical import LogicalTensor

LOGICALS = [
    LogicalTensor((480,)),
    LogicalTensor((16, 30), 0),
    LogicalTensor((30, 16), 1),
    LogicalTensor((32, 15), 0, (16, 8, 8)),
    LogicalTensor((3, 32, 5), 1, (16, 16)),
]
cut = pytest.mark.parametrize("logical", LOGICALS)


def _fragment(logical: LogicalTensor, values: torch.Tensor, rank: int = 0, size: int = 1, start: int = 0):
    return Fragment("a", logical, rank, size, start, {"parameter": values, "exp_avg": values * 2})


@cut
@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_index_is_that_of_the_whole(logical: LogicalTensor, size: int) -> None:
    numbers = torch.arange(480).view(logical.shape)
    for rank in range(size):
        part = logical.cut(numbers, rank, size).reshape(-1)
        index = torch.arange(3, len(part) - 1)
        assert torch.equal(logical_index(index, logical, rank, size), part[3:-1])


@cut
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("pieces", [1, 3])
def test_digests_of_fragments_add_up(
    logical: LogicalTensor, size: int, pieces: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = torch.randn(logical.shape)
    expected = digests(_fragment(logical, whole.reshape(-1)))
    monkeypatch.setattr("parallel.digest._CHUNK", 50)  # so that chunks end within rows
    totals = dict.fromkeys(expected, 0)
    for rank in range(size if logical.dim is not None else 1):
        part = logical.cut(whole, rank, size).reshape(-1)
        start = 0
        for piece in part.tensor_split(pieces):
            fragment = _fragment(logical, piece, rank, size if logical.dim is not None else 1, start)
            for kind, value in digests(fragment).items():
                totals[kind] = (totals[kind] + value) % MODULUS
            start += len(piece)
    assert totals == expected
    assert expected["parameter"] != expected["exp_avg"]


def test_every_bit_and_every_place_count() -> None:
    logical, values = LogicalTensor((64,)), torch.randn(64)
    values[5], values[6] = 0.0, -0.0
    seen = {digests(_fragment(logical, values))["parameter"]}
    changed = []
    for bit in range(32):
        other = values.clone()
        other.view(torch.int32)[17] ^= 1 << bit if bit < 31 else -(2**31)
        changed.append(other)
    for first, second in ((0, 1), (0, 63), (5, 6), (30, 31)):
        other = values.clone()
        other[[first, second]] = other[[second, first]]
        changed.append(other)
    changed += [values.roll(1), values.flip(0), torch.zeros(64), torch.full((64,), torch.nan)]
    seen |= {digests(_fragment(logical, other))["parameter"] for other in changed}
    assert len(seen) == 1 + len(changed)


def test_a_frozen_weight_in_bf16_has_the_digest_of_its_fp32_copy() -> None:
    values = torch.randn(100).bfloat16()
    fragment = Fragment("a", LogicalTensor((100,)), 0, 1, 0, {"parameter": values})
    assert digests(fragment) == digests(replace(fragment, values={"parameter": values.float()}))


def test_it_is_the_number_that_its_definition_gives() -> None:
    """In Python's integers, so that a checkpoint of today is still good with tomorrow's torch."""
    values = torch.tensor([1.5, -2.25, 0.0])
    total = 0
    for index, bits in enumerate(values.view(torch.int32).tolist()):
        mixed = ((index + 4) * 0x9E3779B97F4A7C15 ^ bits) * 0xB504F333F9DE6485 % MODULUS
        total += mixed ^ (mixed >> 32)
    fragment = Fragment("a", LogicalTensor((9,)), 0, 1, 4, {"parameter": values})
    assert digests(fragment) == {"parameter": total % MODULUS}
