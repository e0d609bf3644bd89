"""A digest of a logical tensor, which is the sum of digests of its fragments on all ranks."""

import torch
from jaxtyping import Int
from torch import Tensor

from parallel.fragments import PARAMETER, Fragment
from parallel.logical import LogicalTensor

MODULUS = 2**64
_CHUNK = 1 << 16
"""Elements that are hashed at a time: temporaries of half a megabyte fit a core's cache."""
# Odd 64-bit constants with irregular bits (of the golden ratio and of sqrt 2), as signed numbers for torch.
_POSITION, _MIX = 0x9E3779B97F4A7C15 - MODULUS, 0xB504F333F9DE6485 - MODULUS


def digests(fragment: Fragment) -> dict[str, int]:
    """By kind of value, the fragment's share of the digest of its logical tensor, modulo 2^64.

    The digest is a sum over elements of a hash of the element's fp32 bits and its index in the whole tensor.
    It does not depend on how the tensor is cut, and changes if a bit changes or two elements are swapped.
    """
    device = fragment.values[PARAMETER].device
    totals = {kind: torch.zeros((), dtype=torch.int64, device=device) for kind in fragment.values}
    for first in range(0, fragment.count, _CHUNK):
        last = min(first + _CHUNK, fragment.count)
        index = torch.arange(fragment.start + first, fragment.start + last, device=device)
        position = logical_index(index, fragment.logical, fragment.tp_rank, fragment.tp_size) * _POSITION
        for kind, values in fragment.values.items():
            mixed = position ^ values[first:last].float().view(torch.int32)
            mixed *= _MIX
            # The upper half depends on all bits. It is shifted down, without the sign that torch's shift
            # keeps.
            mixed ^= (mixed >> 32) & 0xFFFFFFFF
            totals[kind] += mixed.sum()
    return {kind: int(total) % MODULUS for kind, total in totals.items()}


def logical_index(
    index: Int[Tensor, " n"], logical: LogicalTensor, tp_rank: int, tp_size: int
) -> Int[Tensor, " n"]:
    """Flat indices in the whole tensor, from flat indices in the part of a tensor-parallel rank."""
    if logical.dim is None or tp_size == 1:
        return index
    width = logical.shape[logical.dim]
    along = LogicalTensor((width,), 0, logical.blocks).cut(
        torch.arange(width, device=index.device), tp_rank, tp_size
    )
    inner = 1
    for size in logical.shape[logical.dim + 1 :]:
        inner *= size
    line, rest = index // inner, index % inner
    outer, position = line // len(along), line % len(along)
    return (outer * width + along[position]) * inner + rest
