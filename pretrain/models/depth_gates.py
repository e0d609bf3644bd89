"""Scores that depth routers give tokens, and gates made of the scores."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from parallel.precision import at_least_fp32
from pretrain.models.depth_config import DepthConfig


def scores(
    x: Float[Tensor, "tokens d_model"], weight: Float[Tensor, " d_model"], eps: float
) -> Float[Tensor, " tokens"]:
    """<w, x / rms(x)> / d_model in fp32, so that scores do not grow with the residual stream.

    Tokens are ranked by them in fp32 and before any gate: in bf16 the tanh gate has 78 values, and many
    tokens tie. Equal rows get equal scores wherever they lie, so that ties do not depend on the packing.

    Scores are divided by d_model, with weights as many times larger, because Adam moves every weight by the
    learning rate: d_model weights that move alike would else move all scores by d_model learning rates in a
    step, which thresholds of earlier steps cannot follow (the rule for output weights in arXiv 2203.03466,
    table 8).
    """
    return _Scores.apply(x, weight, eps)


class _Scores(torch.autograd.Function):
    """The gradient is written by hand, because autograd would keep x in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        # 1 / (rms d_model)
        mean_square = torch.linalg.vector_norm(wide, dim=-1).square_().div_(x.shape[1])
        inverse_rms = mean_square.add_(eps).rsqrt_().div_(x.shape[1])
        # Not wide @ weight: a matrix-vector product works on blocks of rows, and equal rows of different
        # blocks differ in their last bits (in 219 of 228 products at d_model 128 on a CPU; here in none).
        dots = (wide * at_least_fp32(weight)).sum(-1)
        ctx.save_for_backward(x, weight, inverse_rms, dots)
        return dots * inverse_rms

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        x, weight, inverse_rms, dots = ctx.saved_tensors
        # s = r <w, x> with r = 1 / (d rms(x)):  dw = sum(ds r x),  dx = ds (r w - d r^3 <w, x> x)
        wide = at_least_fp32(x)
        scaled = grad * inverse_rms
        pull = (scaled * dots * inverse_rms.square() * -x.shape[1]).unsqueeze(1)
        grad_x = torch.outer(scaled, at_least_fp32(weight)).addcmul_(wide, pull)
        return grad_x.to(x.dtype), wide.t().mv(scaled).to(weight.dtype), None


def gates(
    config: DepthConfig, scores: Float[Tensor, " tokens"], documents: Int[Tensor, " tokens"] | None
) -> Float[Tensor, " tokens"]:
    """Gates, fp32: 1 leaves what the block adds to a token as it is. `documents`: number of each token's
    document, from 0; needed for softmax only."""
    match config.gate:
        case "tanh":
            return 1 + config.alpha * torch.tanh(scores)
        case "sigmoid":
            return torch.sigmoid(scores)
        case "none":
            return 1 + 0 * scores  # the router's gradient is 0, not None
        case "softmax" | "shifted_softmax":
            assert documents is not None
            shares = _softmax_in_documents(scores, documents)
            return shares if config.gate == "softmax" else 1 + shares


def add_gated(
    x: Float[Tensor, "tokens d_model"],
    rows: Int[Tensor, " chosen"],
    gates: Float[Tensor, "chosen 1"],
    *added: Float[Tensor, "chosen d_model"],
) -> Float[Tensor, "tokens d_model"]:
    """x with each of `added`, times the gates, added to `rows`. They are added one after the other, as in a
    block without routing: gates of 1 change no bit of what the block computes."""
    return _AddGated.apply(x, rows, gates, *added)


class _AddGated(torch.autograd.Function):
    """The gradient is written by hand, because autograd would keep each of `added`, while the gradient of
    the gates needs only their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, gates: Tensor, *added: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, sum(added[1:], added[0]))
        ctx.count = len(added)
        out = x.clone()
        for sublayer in added:
            out.index_add_(0, rows, (gates * sublayer).to(x.dtype))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, gates, total = ctx.saved_tensors
        of_rows = grad.index_select(0, rows)
        grad_gates = (at_least_fp32(of_rows) * total).sum(1, keepdim=True)
        return grad, None, grad_gates, *[(gates * of_rows).to(total.dtype)] * ctx.count


def _softmax_in_documents(scores: Tensor, documents: Tensor) -> Tensor:
    if not scores.shape[0]:
        return scores
    number = int(documents.shape[0])  # not more documents than tokens
    highest = scores.new_full((number,), -torch.inf)
    highest = highest.scatter_reduce(0, documents, scores.detach(), "amax")
    exponentials = (scores - highest[documents]).exp()
    totals = scores.new_zeros(number).index_add(0, documents, exponentials)
    return exponentials / totals[documents]
