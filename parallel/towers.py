"""Linear layers and norms that hold one weight shard per tower, on megatron-core's tensor-parallel layers.

The input is the sorted stream (parallel/routing.py): rows [0, counts[0]) belong to the first tower, and so
on. Every tower multiplies its own slice. All else is done once for all towers, so towers add no collective.
The collectives over tensor-parallel ranks are (parallel/collectives.py):

                        before a column-parallel layer       after a row-parallel layer
    forward             -               | gather rows        sum            | scatter the sum
    backward            sum             | scatter the sum,   -              | gather rows
                                        | gather rows again
                        whole stream    | sequence parallel  whole stream   | sequence parallel

Rows are gathered again for the gradient of the weights, so that only a chunk is kept. A single rank has no
collectives and does not need torch.distributed.

A layer that is tied between towers has one shard, whose name its caller chooses, for all rows. The name of a
parameter ends with the name of its shard: `<layer>.weight.<shard>`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from parallel.collectives import ONE_RANK, TensorParallel, combine, combine_gradient, gather_rows, sum_
from parallel.layer_norm import sliced_layer_norm
from parallel.logical import LogicalTensor, mark
from parallel.megatron import (
    ColumnParallelLinear,
    ModelParallelConfig,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from parallel.precision import at_least_fp32

Initialise = Callable[[Tensor, str], Any]
"""A function that fills the whole (uncut) weight of a shard in place. It gets the shard's name too, and so
decides whether shards start equal."""


def _zero(bias: Tensor, _: str) -> Tensor:
    return bias.zero_()


def megatron_config() -> ModelParallelConfig:
    """The config of megatron-core's layers: weights are drawn whole on the CPU and then cut per rank."""
    return ModelParallelConfig(
        use_cpu_initialization=True, gradient_accumulation_fusion=False, params_dtype=torch.float32
    )


class _SlicedLinear(torch.autograd.Function):
    """The product of every slice of x with its own weight, as one autograd node with one buffer for all
    towers.

    With several ranks in `tp`, x is the input of a column-parallel layer, whose gradient is summed over ranks
    while the gradient of the weights is computed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], tp: TensorParallel, *weights: Tensor) -> Tensor:
        ctx.save_for_backward(x, *weights)
        ctx.rows, ctx.tp = rows, tp
        if tp.sequence_parallel:
            x, handle = gather_rows(x, tp)
            handle.wait()
        out = x.new_empty(x.shape[0], weights[0].shape[0])
        for x_piece, out_piece, weight in zip(x.split(rows), out.split(rows), weights, strict=True):
            torch.mm(x_piece, weight.t(), out=out_piece)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        tp, gathered, summed = ctx.tp, None, None
        needs_weights = any(ctx.needs_input_grad[3:])
        if tp.sequence_parallel and needs_weights:
            x, gathered = gather_rows(x, tp)
        grad_pieces = grad.split(ctx.rows)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad.new_empty(grad.shape[0], weights[0].shape[1])
            for grad_piece, out, weight in zip(grad_pieces, grad_x.split(ctx.rows), weights, strict=True):
                torch.mm(grad_piece, weight, out=out)
            grad_x, summed = combine_gradient(grad_x, tp)
        if gathered is not None:
            gathered.wait()
        grad_weights: list[Tensor | None] = [None] * len(weights)
        if needs_weights:
            # An absent tower gets a gradient of zeros, not None, because all ranks reduce the same
            # parameters.
            pieces = zip(grad_pieces, x.split(ctx.rows), ctx.needs_input_grad[3:], strict=True)
            grad_weights = [g.t().mm(x_piece) if needed else None for g, x_piece, needed in pieces]
        if summed is not None:
            summed.wait()
        return grad_x, None, None, *grad_weights


class _SlicedBias(torch.autograd.Function):
    """Adds its own bias to every slice of x, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: tuple[int, ...], *biases: Tensor) -> Tensor:
        ctx.rows = rows
        ctx.mark_dirty(x)
        for piece, bias in zip(x.split(rows), biases, strict=True):
            piece.add_(bias)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, *(piece.sum(0) for piece in grad.split(ctx.rows))


class TowerColumnParallelLinear(ColumnParallelLinear):
    """x @ weight[tower].T, plus bias[tower] if asked for; weights [out, in] and biases are cut along `out`
    over tensor-parallel ranks.

    It extends the layer of megatron-core 0.16.1 (tensor_parallel/layers.py) that has no weight of its own.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shards: Sequence[str],
        initialise: Initialise,
        *,
        blocks: Sequence[int] = (),
        weight: nn.ParameterDict | None = None,
        bias: bool = False,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        """`blocks`: numbers of output rows that are cut over ranks by themselves, so that a rank has its part
        of queries, of keys and of values, or of gate and of up. Empty: one block. `weight`: the weights of
        another layer, which this one shares; None: it makes its own. Biases start at zero."""
        super().__init__(
            in_features,
            out_features,
            config=megatron_config(),
            init_method=initialise,
            bias=False,
            skip_weight_param_allocation=True,
            # The base class would reduce the gradient once per tower; here it is reduced once for all towers.
            disable_grad_reduce=True,
            tp_group=tp.group,
        )
        self.shards, self.tp = tuple(shards), tp
        whole = LogicalTensor((out_features, in_features), 0, tuple(blocks))
        self.weight = tower_shards(shards, initialise, whole, tp) if weight is None else weight
        if bias:
            del self.bias  # the base class has registered the name
            of_bias = LogicalTensor((out_features,), 0, tuple(blocks))
            self.bias = tower_shards(shards, _zero, of_bias, tp)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "rows in"], counts: tuple[int, ...]
    ) -> Float[Tensor, "tokens out_local"]:
        """`counts`: rows per tower of the whole stream; `x` is a chunk of it with sequence parallel."""
        rows = rows_of_shards(counts, self.shards)
        out = _SlicedLinear.apply(x, rows, self.tp, *(self.weight[name] for name in self.shards))
        if self.bias is None:
            return out
        return _SlicedBias.apply(out, rows, *(self.bias[name] for name in self.shards))

    def in_parts(
        self, xs: Sequence[Tensor], counts: Sequence[tuple[int, ...]], outputs: Sequence[int]
    ) -> list[Tensor]:
        """This rank's output in parts of `outputs` features; a part has its own x [rows, in] and `counts`.

        The caller sums the gradient of an x over ranks, once for all parts (`sum_gradient`).
        """
        # The weights are split at once, because the gradient of a slice would be as large as the whole.
        parts = zip(*(self.weight[name].split(list(outputs)) for name in self.shards), strict=True)
        rows = [rows_of_shards(of_part, self.shards) for of_part in counts]
        outs = [
            _SlicedLinear.apply(x, of_part, ONE_RANK, *part)
            for x, of_part, part in zip(xs, rows, parts, strict=True)
        ]
        if self.bias is None:
            return outs
        parts = zip(*(self.bias[name].split(list(outputs)) for name in self.shards), strict=True)
        return [_SlicedBias.apply(*each, *part) for *each, part in zip(outs, rows, parts, strict=True)]

    # There is no state beside the weights; megatron-core's empty entry breaks DeepSpeed's universal
    # checkpoint.
    get_extra_state = nn.Module.get_extra_state


class TowerRowParallelLinear(RowParallelLinear):
    """x @ weight[tower].T without bias; x and weights [out, in] are cut along `in` over tensor-parallel
    ranks.

    It extends the layer of megatron-core 0.16.1 (tensor_parallel/layers.py).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        shards: Sequence[str],
        initialise: Initialise,
        *,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        with torch.device("meta"):  # the base class always makes a weight of its own
            super().__init__(
                in_features,
                out_features,
                config=replace(megatron_config(), perform_initialization=False),
                init_method=initialise,
                bias=False,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=tp.group,
            )
        del self.weight
        self.shards, self.tp = tuple(shards), tp
        self.weight = tower_shards(shards, initialise, LogicalTensor((out_features, in_features), 1), tp)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "tokens in_local"], counts: tuple[int, ...]
    ) -> Float[Tensor, "rows out"]:
        """The sum over ranks: all rows, or this rank's chunk of them with sequence parallel."""
        rows = rows_of_shards(counts, self.shards)
        out = _SlicedLinear.apply(x, rows, ONE_RANK, *(self.weight[name] for name in self.shards))
        return combine(out, self.tp)

    get_extra_state = nn.Module.get_extra_state


class TowerEmbedding(VocabParallelEmbedding):
    """Rows of weight[tower] for token ids; the rows of weights are cut over tensor-parallel ranks.

    It extends the layer of megatron-core 0.16.1 (tensor_parallel/layers.py).
    """

    def __init__(
        self,
        vocab_tokens: int,
        d_model: int,
        shards: Sequence[str],
        initialise: Initialise,
        *,
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                vocab_tokens,
                d_model,
                init_method=initialise,
                config=replace(megatron_config(), perform_initialization=False),
                tp_group=tp.group,
            )
        del self.weight
        self.shards, self.tp = tuple(shards), tp
        self.weight = tower_shards(shards, initialise, LogicalTensor((vocab_tokens, d_model), 0), tp)

    def forward(  # type: ignore[override]
        self, ids: Int[Tensor, " tokens"], counts: tuple[int, ...]
    ) -> Float[Tensor, "rows d_model"]:
        """`ids`: sorted by tower. The sum over ranks: all rows, or this rank's chunk of them with sequence
        parallel."""
        if self.tp.size == 1:
            return self._rows(ids, counts)
        elsewhere = (ids < self.vocab_start_index) | (ids >= self.vocab_end_index)
        rows = self._rows((ids - self.vocab_start_index).masked_fill(elsewhere, 0), counts)
        return combine(rows.masked_fill(elsewhere.unsqueeze(1), 0.0), self.tp)

    def _rows(self, ids: Tensor, counts: tuple[int, ...]) -> Tensor:
        pieces = ids.split(rows_of_shards(counts, self.shards))
        rows = [
            F.embedding(piece, self.weight[name]) for piece, name in zip(pieces, self.shards, strict=True)
        ]
        return rows[0] if len(rows) == 1 else torch.cat(rows)


NormKind = Literal["rms", "layer"]
"""RMSNorm has a weight, LayerNorm a weight and a bias."""


class TowerNorm(nn.Module):
    """RMSNorm or LayerNorm over features with one weight (and bias) per tower, computed in fp32.

    Every tensor-parallel rank holds all weights; with sequence parallel it normalises its own chunk of the
    stream.
    """

    def __init__(
        self,
        features: int,
        shards: Sequence[str],
        eps: float,
        *,
        kind: NormKind = "rms",
        tp: TensorParallel = ONE_RANK,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.shards, self.tp = tuple(shards), tp
        self.weight = nn.ParameterDict([(name, nn.Parameter(torch.ones(features))) for name in shards])
        self.bias = norm_biases(kind, shards, features)

    def forward(
        self, x: Float[Tensor, "rows features"], counts: tuple[int, ...]
    ) -> Float[Tensor, "rows features"]:
        """`counts`: rows per tower of the whole stream; `x` is a chunk of it with sequence parallel."""
        rows = self.tp.chunk_counts(rows_of_shards(counts, self.shards))
        weights = [self.weight[name] for name in self.shards]
        if self.bias is None:
            return _SlicedNorm.apply(x, rows, self.eps, self.tp, *weights)
        biases = [self.bias[name] for name in self.shards]
        tp = self.tp if self.tp.sequence_parallel else ONE_RANK  # else every rank sees all rows
        return sliced_layer_norm(x, rows, weights, biases, self.eps, tp)


def norm_biases(kind: NormKind, shards: Sequence[str], features: int) -> nn.ParameterDict | None:
    """The biases of a norm, which start at zero; None for RMSNorm, which has none."""
    if kind == "rms":
        return None
    return nn.ParameterDict([(name, nn.Parameter(torch.zeros(features))) for name in shards])


class _SlicedNorm(torch.autograd.Function):
    """RMSNorm of every slice with its own weight. The gradient is written by hand, because autograd's passes
    over memory would cost more than the arithmetic."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, rows: tuple[int, ...], eps: float, tp: TensorParallel, *weights: Tensor
    ) -> Tensor:
        wide = at_least_fp32(x)
        inverse_rms = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        out = wide * inverse_rms
        for piece, weight in zip(out.split(rows), weights, strict=True):
            piece.mul_(weight)
        ctx.save_for_backward(x, inverse_rms, *weights)
        ctx.rows, ctx.tp = rows, tp
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, inverse_rms, *weights = ctx.saved_tensors
        wide, grad = at_least_fp32(x), at_least_fp32(grad)
        # out = x r w with r = 1 / rms(x):  dw = sum(dout x r),  dx = dout w r - x r^2 mean(dout w x r)
        product = grad * wide
        pulls, grad_weights, grad_x = [], [], torch.empty_like(wide)
        pieces = zip(
            *(part.split(ctx.rows) for part in (product, inverse_rms, grad, grad_x)), weights, strict=True
        )
        for product_piece, inverse_piece, grad_piece, grad_x_piece, weight in pieces:
            grad_weights.append(product_piece.t().mv(inverse_piece.squeeze(1)))
            pulls.append(product_piece.mv(at_least_fp32(weight)))
            torch.mul(grad_piece, weight, out=grad_x_piece)
        pull = torch.cat(pulls).unsqueeze(1).mul_(inverse_rms.square() / -x.shape[1])
        grad_x.addcmul_(wide, pull).mul_(inverse_rms)
        if ctx.tp.sequence_parallel:  # a rank saw only its chunk; one sum serves all towers
            grad_weights = sum_(torch.stack(grad_weights), ctx.tp).unbind()
        return grad_x.to(x.dtype), None, None, None, *grad_weights


def rows_of_shards(counts: tuple[int, ...], shards: Sequence[str]) -> tuple[int, ...]:
    """Rows per shard, from rows per tower; a layer with one shard takes all rows."""
    return counts if len(shards) > 1 else (sum(counts),)


def tower_shards(
    names: Sequence[str], initialise: Initialise, logical: LogicalTensor, tp: TensorParallel
) -> nn.ParameterDict:
    """This rank's parts of the weights `names`, with the attributes that DeepSpeed and megatron-core read."""
    shards = nn.ParameterDict()
    for name in names:
        whole = torch.empty(logical.shape)
        initialise(whole, name)
        part = logical.cut(whole, tp.rank, tp.size)
        shards[name] = mark(
            nn.Parameter(part if tp.size == 1 else part.clone(memory_format=torch.contiguous_format)),
            logical,
        )
        set_tensor_model_parallel_attributes(
            shards[name], is_parallel=True, dim=logical.dim, stride=max(1, len(logical.blocks))
        )
    return shards
