"""What queries and keys go through before they meet: RMSNorm or LayerNorm per head with one weight (and
bias) per tower, then RoPE."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from parallel.collectives import ONE_RANK, TensorParallel, sum_
from parallel.layer_norm import sliced_layer_norm
from parallel.precision import at_least_fp32
from parallel.routing import Routing
from parallel.towers import NormKind, norm_biases
from pretrain.models.rope import scaled_frequencies
from pretrain.models.rope_config import RopeScalingConfig

Rotary = Complex[Tensor, "tokens 1 pairs"]
"""exp(i angle), the turn of each of a head's head_dim / 2 pairs at each token: complex64, or complex128 of a
model in fp64. Its magnitude is 1, but for yarn scaling."""


def rotary_table(
    positions: Int[Tensor, " tokens"],
    head_dim: int,
    theta: float,
    dtype: torch.dtype = torch.float32,
    scaling: RopeScalingConfig | None = None,
) -> Rotary:
    """Turns of RoPE (Su et al. 2021, Eq. 34) for positions, on their device. `dtype`: of the angles."""
    # No buffer: an engine that casts the module to bf16 would cast the frequencies with it.
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=dtype) / head_dim
    frequencies = theta**-exponents
    if scaling is not None:
        frequencies = scaled_frequencies(frequencies, theta, scaling)
    angles = positions.to(dtype)[:, None, None] * frequencies
    return torch.polar(torch.full_like(angles, 1.0 if scaling is None else scaling.magnitude), angles)


class NormRotate(nn.Module):
    """Normalises (if asked to) and rotates the queries and keys of a fused QKV, and puts its rows into
    sequence order.

    RoPE turns the pairs (x[2i], x[2i + 1]) of a head by angles of its token's position. Both steps look at
    one token at a time, so the permutation is simply where they write to, and costs no pass over memory of
    its own.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        kv_heads: int,
        shards: Sequence[str],
        *,
        norm: NormKind | None,
        eps: float,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        """`num_heads`, `kv_heads`: of this tensor-parallel rank. All ranks hold all norm weights."""
        super().__init__()
        self.num_heads, self.kv_heads, self.eps, self.tp = num_heads, kv_heads, eps, tp
        self.head_dim, self.shards = head_dim, tuple(shards) if norm else ()
        self.weight = nn.ParameterDict(
            [(name, nn.Parameter(torch.ones(2 * head_dim))) for name in self.shards]
        )
        """Per tower: the weight of query heads, then the weight of key heads."""
        self.bias = norm_biases(norm or "rms", shards, 2 * head_dim)
        """As `weight`."""

    def forward(
        self,
        qkv: Float[Tensor, "tokens features"],
        routing: Routing,
        rotary: Rotary,
        *,
        heads: tuple[int, int] | None = None,
    ) -> Float[Tensor, "tokens features"]:
        """Rows hold query heads, key heads, value heads. `qkv` and `rotary` are sorted by tower, the result
        is in sequence order. `heads`: query and key heads in `qkv`, where some are left out."""
        weights = [self.weight[name] for name in self.shards]
        rows = routing.counts if len(weights) > 1 else (qkv.shape[0],)
        orders = (None, None) if routing.identity else (routing.to_sequence, routing.to_sorted)
        heads = heads or (self.num_heads, self.kv_heads)
        if self.bias is not None:
            qkv, weights = self._layer_normed(qkv, rows, heads), []
        return _NormRotate.apply(qkv, rotary, *orders, rows, heads, self.eps, self.tp, *weights)

    def _layer_normed(self, qkv: Tensor, rows: tuple[int, ...], heads: tuple[int, int]) -> Tensor:
        """`qkv`, sorted by tower, after LayerNorm of its query heads and of its key heads."""
        assert self.bias is not None
        weights, biases = (
            zip(*(of[name].chunk(2) for name in self.shards), strict=True) for of in (self.weight, self.bias)
        )
        normed, start = [], 0
        for count, weight, bias in zip(heads, weights, biases, strict=True):
            part = qkv.narrow(1, start, count * self.head_dim).unflatten(1, (count, self.head_dim))
            normed.append(sliced_layer_norm(part, rows, weight, bias, self.eps, self.tp))
            start += count * self.head_dim
        return torch.cat([*(part.flatten(1) for part in normed), qkv[:, start:]], dim=1)


class _NormRotate(torch.autograd.Function):
    """By hand, because autograd's passes over memory would cost more than the arithmetic. No weights: no
    norm."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        rotary: Tensor,
        to_sequence: Tensor | None,
        to_sorted: Tensor | None,
        rows: tuple[int, ...],
        heads: tuple[int, int],
        eps: float,
        tp: TensorParallel,
        *weights: Tensor,
    ) -> Tensor:
        ctx.tp, ctx.rows, ctx.heads, ctx.split = tp, rows, heads, sum(heads) * 2 * rotary.shape[-1]
        out = _moved(qkv, to_sequence)
        work, store = _widened(_query_key(out, ctx))
        inverse_rms = None
        if weights:
            x = at_least_fp32(_query_key(qkv, ctx))
            inverse_rms = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
            work.mul_(_moved(inverse_rms, to_sequence))
            each_token = weights[0].unsqueeze(0)
            if len(weights) > 1:
                each_token = torch.cat([w.expand(n, -1) for w, n in zip(weights, rows, strict=True)])
                each_token = _moved(each_token, to_sequence)
            each_token = each_token.unflatten(1, (2, 1, -1))
            for part, weight in zip(work.split(heads, dim=1), each_token.unbind(1), strict=True):
                part.mul_(weight)
        _pairs(work).mul_(_moved(rotary, to_sequence))
        store()
        ctx.save_for_backward(qkv if weights else None, inverse_rms, rotary, to_sorted, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        qkv, inverse_rms, rotary, to_sorted, *weights = ctx.saved_tensors
        grad_in = _moved(grad, to_sorted)
        work, store = _widened(_query_key(grad_in, ctx))
        _pairs(work).mul_(rotary.conj_physical())
        grad_weights: list[Tensor] = []
        if weights:
            # y = x r w with r = 1 / rms(x):  dw = sum(dy x r),  dx = dy w r - x r^2 mean(dy w x r)
            x = at_least_fp32(_query_key(qkv, ctx))
            product = (work * x).mul_(inverse_rms)
            pieces = zip(product.split(ctx.rows), work.split(ctx.rows), weights, strict=True)
            for product_piece, work_piece, weight in pieces:
                each_head = _per_head(weight, ctx.heads)
                grads = product_piece.sum(0).split(ctx.heads)
                grad_weights.append(torch.cat([grad.sum(0) for grad in grads]))
                product_piece.mul_(each_head)
                work_piece.mul_(each_head)
            pull = product.mean(-1, keepdim=True).mul_(inverse_rms)
            work.addcmul_(x, pull, value=-1).mul_(inverse_rms)
        store()
        if weights and ctx.tp.size > 1:  # each rank saw its own heads; one sum for all towers
            grad_weights = list(sum_(torch.stack(grad_weights), ctx.tp).unbind())
        return grad_in, *(None,) * 7, *grad_weights


def _moved(x: Tensor, order: Tensor | None) -> Tensor:
    """A contiguous copy of `x` with its rows in another order, or in the same."""
    return x.clone(memory_format=torch.contiguous_format) if order is None else x.index_select(0, order)


def _query_key(qkv: Tensor, ctx: Any) -> Tensor:
    """Its query and key heads as [tokens, heads, head_dim]; a view."""
    return qkv[:, : ctx.split].unflatten(1, (sum(ctx.heads), -1))


def _per_head(weight: Tensor, heads: tuple[int, int]) -> Tensor:
    """[heads, head_dim]: the first half of `weight` for each query head, the second for each key head."""
    query, key = weight.view(2, 1, -1)
    return torch.cat((query.expand(heads[0], -1), key.expand(heads[1], -1)))


def _pairs(x: Tensor) -> Tensor:
    """The pairs (x[2i], x[2i + 1]) as complex numbers; a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _widened(view: Tensor) -> tuple[Tensor, Callable[[], object]]:
    """Where to compute in place of `view`, and what then puts the result there: nothing, if it is wide."""
    work = at_least_fp32(view)
    return work, (lambda: None) if work is view else (lambda: view.copy_(work))
