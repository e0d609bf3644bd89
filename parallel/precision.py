"""The dtype in which sums over a row are made."""

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """`x` in fp32 if its dtype is narrower, else `x` itself.

    bf16 models thus sum in fp32, and a model in fp64 stays in fp64, where tests tell a mistake from rounding.
    """
    return x if x.dtype == torch.float64 else x.float()
