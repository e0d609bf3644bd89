"""What queries and keys go through before they meet: RMSNorm per head with one weight per tower, then
RoPE."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

Rotary = Complex[Tensor, "tokens 1 pairs"]
"""complex64 exp(i angle): the turn of each of a head's head_dim / 2 pairs at each token."""


def rotary_table(positions: Int[Tensor, " tokens"], head_dim: int, theta: float) -> Rotary:
    """Turns of RoPE (Su et al. 2021, Eq. 34) for positions, on their device."""
    # No buffer: an engine that casts the module to bf16 would cast the frequencies with it.
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None, None] * theta**-exponents
    return torch.polar(torch.ones_like(angles), angles)


class NormRotate(nn.Module):
    """Normalises (if asked to) and rotates the queries and keys of a fused QKV; values pass through.

    RoPE turns the pairs (x[2i], x[2i + 1]) of a head by angles of its token's position. It looks at one token
    at a time, so it is done here, in sorted order, rather than after the permutation to sequence order.
    """

    def __init__(
        self, head_dim: int, num_heads: int, kv_heads: int, shards: Sequence[str], *, norm: bool, eps: float
    ) -> None:
        super().__init__()
        self.head_dim, self.num_heads, self.kv_heads, self.eps = head_dim, num_heads, kv_heads, eps
        self.shards = tuple(shards) if norm else ()
        self.weight = nn.ParameterDict(
            [(name, nn.Parameter(torch.ones(2 * head_dim))) for name in self.shards]
        )
        """Per tower: the weight of query heads, then the weight of key heads."""

    def forward(
        self, qkv: Float[Tensor, "tokens features"], counts: tuple[int, ...], rotary: Rotary
    ) -> Float[Tensor, "tokens features"]:
        """`qkv`, `rotary` and the result are sorted by tower; a row holds query heads, key heads, value
        heads."""
        weights = [self._per_head(self.weight[name]) for name in self.shards]
        rows = counts if len(weights) > 1 else (qkv.shape[0],)
        return _NormRotate.apply(qkv, rotary, rows, self.num_heads + self.kv_heads, self.eps, *weights)

    def _per_head(self, weight: Tensor) -> Tensor:
        query, key = weight.view(2, 1, self.head_dim)
        return torch.cat((query.expand(self.num_heads, -1), key.expand(self.kv_heads, -1)))


class _NormRotate(torch.autograd.Function):
    """By hand, because autograd's passes over memory would cost more than the arithmetic. No weights: no
    norm."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, rotary: Tensor, rows: tuple[int, ...], heads: int, eps: float, *weights: Tensor
    ) -> Tensor:
        split = heads * 2 * rotary.shape[-1]
        out = qkv.clone()
        work, store = _in_fp32(out[:, :split].unflatten(1, (heads, -1)))
        inverse_rms = None
        if weights:
            inverse_rms = work.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            work.mul_(inverse_rms)
            for piece, weight in zip(work.split(rows), weights, strict=True):
                piece.mul_(weight)
        _pairs(work).mul_(rotary)
        store()
        ctx.save_for_backward(qkv if weights else None, inverse_rms, rotary, *weights)
        ctx.rows, ctx.heads, ctx.split = rows, heads, split
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, inverse_rms, rotary, *weights = ctx.saved_tensors
        grad_in = grad.clone(memory_format=torch.contiguous_format)
        work, store = _in_fp32(grad_in[:, : ctx.split].unflatten(1, (ctx.heads, -1)))
        _pairs(work).mul_(rotary.conj_physical())
        grad_weights: list[Tensor] = []
        if weights:
            # y = x r w with r = 1 / rms(x):  dw = sum(dy x r),  dx = dy w r - x r^2 mean(dy w x r)
            x = qkv[:, : ctx.split].unflatten(1, (ctx.heads, -1)).float()
            product = (work * x).mul_(inverse_rms)
            pieces = zip(product.split(ctx.rows), work.split(ctx.rows), weights, strict=True)
            for product_piece, work_piece, weight in pieces:
                grad_weights.append(product_piece.sum(0))
                product_piece.mul_(weight)
                work_piece.mul_(weight)
            pull = product.mean(-1, keepdim=True).mul_(inverse_rms)
            work.addcmul_(x, pull, value=-1).mul_(inverse_rms)
        store()
        return grad_in, *(None,) * 4, *grad_weights


def _pairs(x: Tensor) -> Tensor:
    """The fp32 pairs (x[2i], x[2i + 1]) as complex numbers; a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _in_fp32(view: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Where to compute in place of `view`, and what then puts the result there: nothing, if it is fp32."""
    if view.dtype == torch.float32:
        return view, lambda: None
    work = view.float()
    return work, lambda: view.copy_(work)
