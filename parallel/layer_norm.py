"""LayerNorm (Ba et al. 2016, arXiv 1607.06450) of slices of rows, each slice with its own weight and bias."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from parallel.collectives import ONE_RANK, TensorParallel, sum_
from parallel.precision import at_least_fp32


def sliced_layer_norm(
    x: Float[Tensor, "rows ... features"],
    rows: Sequence[int],
    weights: Sequence[Float[Tensor, " features"]],
    biases: Sequence[Float[Tensor, " features"]],
    eps: float,
    tp: TensorParallel = ONE_RANK,
) -> Float[Tensor, "rows ... features"]:
    """(x - mean) / sqrt(variance + eps) * weight + bias over features, computed in fp32 and rounded once.

    `rows`: the number of rows of each weight and bias, in order. A slice of no rows gives its weight and bias
    gradients of zeros. `tp`: ranks that hold the same weights and biases, and each other rows or heads.
    """
    return _SlicedLayerNorm.apply(x, tuple(rows), eps, tp, *weights, *biases)


class _SlicedLayerNorm(torch.autograd.Function):
    """The gradient is written by hand, because autograd would keep a bf16 input in fp32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: tuple[int, ...], eps: float, tp: TensorParallel, *parameters: Tensor
    ) -> Tensor:
        weights, biases = parameters[: len(rows)], parameters[len(rows) :]
        wide = at_least_fp32(x)
        mean = wide.mean(-1, keepdim=True)
        out = wide - mean
        inverse_std = out.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out.mul_(inverse_std)
        for piece, weight, bias in zip(out.split(rows), weights, biases, strict=True):
            piece.mul_(weight).add_(bias)
        ctx.save_for_backward(x, mean, inverse_std, *weights)
        ctx.rows, ctx.tp = rows, tp
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, mean, inverse_std, *weights = ctx.saved_tensors
        # out = n w + b with n = (x - mean) r:
        # dw = sum(dout n),  db = sum(dout),  dx = r (dn - mean(dn) - n mean(dn n)) with dn = dout w
        normed, grad = (at_least_fp32(x) - mean).mul_(inverse_std), at_least_fp32(grad)
        grad_normed = torch.empty_like(normed)
        grad_weights, grad_biases = [], []
        pieces = zip(*(part.split(ctx.rows) for part in (normed, grad, grad_normed)), weights, strict=True)
        for normed_piece, grad_piece, out, weight in pieces:
            grad_weights.append((grad_piece * normed_piece).flatten(0, -2).sum(0).to(weight.dtype))
            grad_biases.append(grad_piece.flatten(0, -2).sum(0).to(weight.dtype))
            torch.mul(grad_piece, weight, out=out)
        pull = (grad_normed * normed).mean(-1, keepdim=True)
        grad_normed.sub_(grad_normed.mean(-1, keepdim=True)).addcmul_(normed, pull, value=-1)
        grads = grad_weights + grad_biases
        if ctx.tp.size > 1:  # one sum serves all slices
            grads = sum_(torch.stack(grads), ctx.tp).unbind()
        return grad_normed.mul_(inverse_std).to(x.dtype), None, None, None, *grads
