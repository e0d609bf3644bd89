"""Scores of tokens, and the gates that they become."""

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

    Ranked in fp32 and before any gate: in bf16 the tanh gate has 78 values, and many tokens tie. Divided,
    with weights as many times larger, for Adam, which moves every weight by the learning rate: d_model of
    them that move alike would else move all scores by d_model learning rates in a step, which thresholds of
    earlier steps cannot follow (the rule for output weights in arXiv 2203.03466, table 8).
    """
    return _Scores.apply(x, weight, eps)


class _Scores(torch.autograd.Function):
    """By hand, because autograd would keep x in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = at_least_fp32(x)
        # 1 / (rms d_model)
        mean_square = torch.linalg.vector_norm(wide, dim=-1).square_().div_(x.shape[1])
        inverse_rms = mean_square.add_(eps).rsqrt_().div_(x.shape[1])
        dots = wide @ at_least_fp32(weight)
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
    """fp32, 1 where a token is let through as it is. `documents`: of each token, from 0; for softmax only."""
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
    """x with gate times each of `added` added to `rows`. One after the other, as a block without routing adds
    them: gates of 1 change no bit of what it computes."""
    return _AddGated.apply(x, rows, gates, *added)


class _AddGated(torch.autograd.Function):
    """By hand, because autograd would keep each of `added`, where gates need their sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, gates: Tensor, *added: Tensor) -> Tensor:
        ctx.save_for_backward(rows, gates, sum(added[1:], added[0]))
        ctx.count = len(added)
        out = x.clone()
        for each in added:
            out.index_add_(0, rows, (gates * each).to(x.dtype))
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
