"""LayerNorm of slices against torch's, with gradients."""

import pytest
import torch
from torch.nn import functional as F

from parallel.layer_norm import sliced_layer_norm
from parallel.precision import at_least_fp32
from tests.pretrain.models.precision import PRECISIONS, TOLERANCE, assert_close

ROWS, FEATURES, EPS = (3, 0, 5), 16, 1e-3
BF16 = 8e-3
"""What is returned is rounded to 8 bits of mantissa, once."""


@pytest.mark.parametrize("inner", [(), (4,)], ids=["rows", "heads"])
@pytest.mark.parametrize("dtype", [*PRECISIONS, torch.bfloat16], ids=str)
def test_every_slice_is_torchs_layer_norm(inner: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = (2 + 3 * torch.randn(2, sum(ROWS), *inner, FEATURES, generator=generator)).to(dtype)
    drawn = (1 + torch.randn(2, len(ROWS), FEATURES, generator=generator)).to(dtype).requires_grad_()
    x.requires_grad_()
    weights, biases = (each.unbind() for each in drawn)
    out = sliced_layer_norm(x, ROWS, weights, biases, EPS)
    assert out.dtype == dtype
    wide, of_slices = at_least_fp32(x), at_least_fp32(drawn)
    expected = torch.cat(
        [
            F.layer_norm(piece, (FEATURES,), weight, bias, EPS)
            for piece, weight, bias in zip(wide.split(ROWS), *of_slices, strict=True)
        ]
    )
    fp32 = BF16 if dtype == torch.bfloat16 else TOLERANCE[torch.float32]
    assert_close(at_least_fp32(out), expected, "norm", fp32=fp32)
    wanted = torch.autograd.grad(expected, (x, drawn), at_least_fp32(grad))
    got = torch.autograd.grad(out, (x, drawn), grad)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.dtype == dtype
        assert_close(at_least_fp32(ours), at_least_fp32(theirs), "gradient", fp32=fp32)
    assert not got[1][:, 1].any(), "a slice of no rows has a zero gradient"
