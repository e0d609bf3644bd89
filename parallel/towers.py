"""Linear layers and norms that hold one weight shard per tower, on megatron-core's tensor-parallel layers.

Input is the sorted stream (parallel/routing.py): rows [0, counts[0]) belong to the first tower, and so on.
Each tower multiplies its own slice; everything else is done once for all towers, so no tower costs a
collective: one copy region before a column-parallel layer (its backward sums input gradients over
tensor-parallel ranks), one sum after a row-parallel layer. With one tensor-parallel rank there is no
collective and torch.distributed need not be started.

A layer that is tied between towers has the one shard that its caller names, and takes all rows.
A parameter's name ends with the name of its shard: `<layer>.weight.<shard>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.utils import get_pg_rank, get_pg_size
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

Initialise = Callable[[Tensor], Any]
"""Fills a whole (unsharded) weight in place. Called once per shard, so it must itself decide whether shards
agree."""


def megatron_config() -> ModelParallelConfig:
    """What megatron-core's layers must be told here: weights are drawn whole on the CPU, then cut per
    rank."""
    return ModelParallelConfig(
        use_cpu_initialization=True, gradient_accumulation_fusion=False, params_dtype=torch.float32
    )


class _SlicedLinear(torch.autograd.Function):
    """Rows of x, slice by slice, times one weight each: one node and one buffer however many towers there
    are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.rows = rows
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for x_piece, out_piece, weight in zip(x.split(rows), out.split(rows), weights, strict=True):
            torch.mm(x_piece, weight.t(), out=out_piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        grad_pieces = grad.split(ctx.rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.empty_like(x)
            for grad_piece, place, weight in zip(grad_pieces, grad_x.split(ctx.rows), weights, strict=True):
                torch.mm(grad_piece, weight, out=place)
        # An absent tower gets a gradient of zeros, not None: every rank reduces the same parameters.
        grad_weights = (
            grad_piece.t().mm(x_piece) if wanted else None
            for grad_piece, x_piece, wanted in zip(
                grad_pieces, x.split(ctx.rows), ctx.needs_input_grad[2:], strict=True
            )
        )
        return grad_x, None, *grad_weights


class TowerColumnParallelLinear(ColumnParallelLinear):
    """x @ weight[tower].T with each weight [out, in] cut along `out` over tensor-parallel ranks. No bias.

    Extends megatron-core 0.16.1 (tensor_parallel/layers.py) in its form without an own weight.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shards: Sequence[str],
        initialise: Initialise,
        *,
        blocks: Sequence[int] | None = None,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        """`blocks`: numbers of output rows, each cut over ranks by itself, so that every rank has its part of
        queries, keys and values, or of gate and value. None: one block."""
        super().__init__(
            in_features,
            out_features,
            config=megatron_config(),
            init_method=initialise,
            bias=False,
            skip_weight_param_allocation=True,
            # The base class reduces once per call of its linear; here that is done once for all towers.
            disable_grad_reduce=True,
            tp_group=tp_group,
        )
        self.shards = tuple(shards)
        self.weight = _shards(
            shards,
            initialise,
            (out_features, in_features),
            dim=0,
            blocks=blocks or (out_features,),
            group=self.tp_group,
        )

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "tokens in"], counts: tuple[int, ...]
    ) -> Float[Tensor, "tokens out_local"]:
        if get_pg_size(self.tp_group) > 1:
            x = copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return _sliced_linear(x, counts, [self.weight[name] for name in self.shards])

    # No state beside the weights: megatron-core's empty entry breaks DeepSpeed's universal checkpoint.
    get_extra_state = nn.Module.get_extra_state


class TowerRowParallelLinear(RowParallelLinear):
    """x @ weight[tower].T with each weight [out, in] and x cut along `in` over tensor-parallel ranks. No
    bias.

    Extends megatron-core 0.16.1 (tensor_parallel/layers.py).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shards: Sequence[str],
        initialise: Initialise,
        *,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        with torch.device("meta"):  # the base class has no form without an own weight
            super().__init__(
                in_features,
                out_features,
                config=replace(megatron_config(), perform_initialization=False),
                init_method=initialise,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=tp_group,
            )
        del self.weight
        self.shards = tuple(shards)
        self.weight = _shards(
            shards,
            initialise,
            (out_features, in_features),
            dim=1,
            blocks=(in_features,),
            group=self.tp_group,
        )

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "tokens in_local"], counts: tuple[int, ...]
    ) -> Float[Tensor, "tokens out"]:
        out = _sliced_linear(x, counts, [self.weight[name] for name in self.shards])
        if get_pg_size(self.tp_group) > 1:
            out = reduce_from_tensor_model_parallel_region(out, group=self.tp_group)
        return out

    get_extra_state = nn.Module.get_extra_state


class SharedEmbedding(VocabParallelEmbedding):
    """Token embedding for all towers, its rows cut over tensor-parallel ranks.

    Extends megatron-core 0.16.1 (tensor_parallel/layers.py) by the name of the one shard.
    """

    def __init__(
        self,
        vocab_tokens: int,
        d_model: int,
        shard: str,
        initialise: Initialise,
        *,
        tp_group: ProcessGroup | None = None,
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                vocab_tokens,
                d_model,
                init_method=initialise,
                config=replace(megatron_config(), perform_initialization=False),
                tp_group=tp_group,
            )
        del self.weight
        self.shard = shard
        self.weight = _shards(
            (shard,),
            initialise,
            (vocab_tokens, d_model),
            dim=0,
            blocks=(vocab_tokens,),
            group=self.tp_group,
        )

    def forward(  # type: ignore[override]
        self, ids: Int[Tensor, " tokens"]
    ) -> Float[Tensor, "tokens d_model"]:
        weight = self.weight[self.shard]
        if get_pg_size(self.tp_group) == 1:
            return F.embedding(ids, weight)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = F.embedding((ids - self.vocab_start_index).masked_fill(elsewhere, 0), weight)
        rows = rows.masked_fill(elsewhere.unsqueeze(1), 0.0)
        return reduce_from_tensor_model_parallel_region(rows, group=self.tp_group)


class TowerNorm(nn.Module):
    """RMSNorm over features with one weight per tower; computed in fp32."""

    def __init__(self, features: int, shards: Sequence[str], eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.shards = tuple(shards)
        self.weight = nn.ParameterDict([(name, nn.Parameter(torch.ones(features))) for name in shards])

    def forward(
        self, x: Float[Tensor, "tokens features"], counts: tuple[int, ...]
    ) -> Float[Tensor, "tokens features"]:
        weights = [self.weight[name] for name in self.shards]
        return _SlicedNorm.apply(x, _rows(counts, len(weights), x.shape[0]), self.eps, *weights)


class _SlicedNorm(torch.autograd.Function):
    """By hand, because autograd's passes over memory would cost more than the arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], eps: float, *weights: Tensor) -> Tensor:
        wide = x.float()
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out = wide * inverse_rms
        for piece, weight in zip(out.split(rows), weights, strict=True):
            piece.mul_(weight)
        ctx.save_for_backward(x, inverse_rms, *weights)
        ctx.rows = rows
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse_rms, *weights = ctx.saved_tensors
        wide, grad = x.float(), grad.float()
        # out = x r w with r = 1 / rms(x):  dw = sum(dout x r),  dx = dout w r - x r^2 mean(dout w x r)
        product = grad * wide
        pulls, grad_weights, grad_x = [], [], torch.empty_like(wide)
        pieces = zip(
            *(part.split(ctx.rows) for part in (product, inverse_rms, grad, grad_x)), weights, strict=True
        )
        for product_piece, inverse_piece, grad_piece, grad_x_piece, weight in pieces:
            grad_weights.append(product_piece.t().mv(inverse_piece.squeeze(1)))
            pulls.append(product_piece.mv(weight.float()))
            torch.mul(grad_piece, weight, out=grad_x_piece)
        pull = torch.cat(pulls).unsqueeze(1).mul_(inverse_rms.square() / -x.shape[1])
        grad_x.addcmul_(wide, pull).mul_(inverse_rms)
        return grad_x.to(x.dtype), None, None, *grad_weights


def _rows(counts: tuple[int, ...], num_shards: int, tokens: int) -> tuple[int, ...]:
    """Rows per shard: a layer with one shard takes all of them, whatever the towers."""
    return counts if num_shards > 1 else (tokens,)


def _sliced_linear(x: Tensor, counts: tuple[int, ...], weights: Sequence[Tensor]) -> Tensor:
    return _SlicedLinear.apply(x, _rows(counts, len(weights), x.shape[0]), *weights)


def _shards(
    names: Sequence[str],
    initialise: Initialise,
    shape: tuple[int, int],
    *,
    dim: int,
    blocks: Sequence[int],
    group: Any,
) -> nn.ParameterDict:
    """This rank's part of one weight per name, with the attributes DeepSpeed and megatron-core read."""
    assert sum(blocks) == shape[dim], (blocks, shape, dim)
    size, rank = get_pg_size(group), get_pg_rank(group)
    shards = nn.ParameterDict()
    for name in names:
        whole = torch.empty(shape)
        initialise(whole)
        parts = [block.chunk(size, dim)[rank] for block in whole.split(list(blocks), dim)]
        shards[name] = nn.Parameter(whole if size == 1 else torch.cat(parts, dim))
        set_tensor_model_parallel_attributes(shards[name], is_parallel=True, dim=dim, stride=len(blocks))
    return shards
