"""Losses as sums: who divides, and by what, is decided in one place (the engine), over all ranks and
micro-batches."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from parallel.collectives import ONE_RANK, TensorParallel, combine_gradient, gather_rows
from parallel.precision import at_least_fp32

CHUNK_TOKENS = 512
"""Tokens whose logits exist at a time. Measured forward and backward on one CPU thread, [tokens, d_model,
vocab]:

                          whole logits:  torch   megatron-core   chunks of:  64    256    512   1024
    [4096, 128,  2816]  ms               192     169                         97    107    103    110
    [1024, 512,  2816]  ms                90      83                         73     76     75     75
    [ 512, 512, 65536]  ms              1368    1216                       1564   1152    949    977

The logits of a chunk stay in cache, and nothing of size [tokens, vocab] is kept for the backward pass.
Tensor-parallel ranks hold a part of the vocabulary each, and take as many times more tokens.
"""


def linear_cross_entropy(
    hidden: Float[Tensor, "rows d_model"],
    weights: Sequence[Float[Tensor, "vocab_local d_model"]],
    tokens_per_weight: Sequence[int],
    targets: Int[Tensor, " tokens"],
    loss_weights: Float[Tensor, " tokens"],
    z_loss: float = 0.0,
    *,
    tp: TensorParallel = ONE_RANK,
) -> tuple[Float[Tensor, ""], Float[Tensor, " tokens"]]:
    """(sum of loss_weights * (nll + z_loss * log^2 Z), nll), where nll = -log softmax(hidden @
    weight.T)[target].

    The first `tokens_per_weight[0]` tokens have the first of `weights`, and so on. Both results are in the
    dtype of `loss_weights`, which is fp32 in training; nll in nats, for every token, without gradient. The
    sum's gradients are made during the forward pass, so no product is computed twice.

    `tp`: `weights` hold this tensor-parallel rank's rows of the vocabulary, `hidden` all tokens or, with
    sequence parallel, its chunk of them. Results are equal on all ranks; they exchange three numbers a token
    (the idea of megatron-core's vocab_parallel_cross_entropy, which is given whole logits).
    """
    if not torch.is_grad_enabled():  # a parameter asks for its gradient even then
        hidden, weights = hidden.detach(), [weight.detach() for weight in weights]
    return _LinearCrossEntropy.apply(
        hidden, targets, loss_weights, tuple(tokens_per_weight), z_loss, tp, *weights
    )


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        loss_weights: Tensor,
        tokens_per_weight: tuple[int, ...],
        z_loss: float,
        tp: TensorParallel,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        if tp.sequence_parallel:
            hidden, handle = gather_rows(hidden, tp)
            handle.wait()
        nll = torch.empty_like(loss_weights)
        objective = loss_weights.new_zeros(())
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weights: list[Tensor | None] = []
        chunk, first = CHUNK_TOKENS * tp.size, 0
        for weight, tokens, wanted in zip(weights, tokens_per_weight, ctx.needs_input_grad[6:], strict=True):
            # In fp32 where the model is bf16: it is added to once per chunk.
            grad_weight = torch.zeros_like(weight, dtype=loss_weights.dtype) if wanted else None
            for start in range(first, first + tokens, chunk):
                rows = slice(start, min(start + chunk, first + tokens))
                of_chunk = hidden[rows], targets[rows, None], loss_weights[rows, None], nll[rows]
                grads = None if grad_hidden is None else grad_hidden[rows], grad_weight
                objective += _chunk(*of_chunk, weight, z_loss, *grads, tp)
            first += tokens
            grad_weights.append(None if grad_weight is None else grad_weight.to(weight.dtype))
        if grad_hidden is not None:
            grad_hidden, summed = combine_gradient(grad_hidden, tp)
            if summed is not None:
                summed.wait()
        ctx.save_for_backward(grad_hidden, *grad_weights)
        ctx.mark_non_differentiable(nll)
        return objective, nll

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, *weights = (None if saved is None else saved * grad for saved in ctx.saved_tensors)
        return hidden, *(None,) * 5, *weights


def _chunk(
    hidden: Tensor,
    targets: Tensor,
    token_weight: Tensor,
    nll: Tensor,
    weight: Tensor,
    z_loss: float,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    tp: TensorParallel,
) -> Tensor:
    """The objective summed over a chunk of tokens. Writes their `nll`, overwrites `grad_hidden` and adds to
    `grad_weight`, where they are wanted. `targets` and `token_weight` are [tokens, 1]."""
    target, here = _local(targets, weight.shape[0], tp)
    logits = at_least_fp32(hidden.mm(weight.t()))
    highest = logits.amax(dim=1, keepdim=True)
    target_logit = logits.gather(1, target) * here
    exponentials = logits.sub_(highest).exp_()
    total = exponentials.sum(dim=1, keepdim=True)
    log_z, target_logit, share = _over_vocabulary(highest, total, target_logit, tp)
    chunk_nll = log_z - target_logit
    nll.copy_(chunk_nll.squeeze(1))
    objective = (token_weight * (chunk_nll + z_loss * log_z.square())).sum()
    if grad_hidden is None and grad_weight is None:
        return objective
    # d/dlogits of w (nll + z log^2 Z) = w (softmax (1 + 2 z log Z) - onehot(target))
    grad = exponentials.mul_(token_weight * (1 + 2 * z_loss * log_z) * share)
    grad = grad.scatter_add_(1, target, -token_weight * here).to(weight.dtype)
    if grad_hidden is not None:
        torch.mm(grad, weight, out=grad_hidden)
    if grad_weight is not None and weight.dtype == grad_weight.dtype:
        torch.addmm(grad_weight, grad.t(), hidden, out=grad_weight)
    elif grad_weight is not None:
        grad_weight += grad.t().mm(hidden)
    return objective


def _local(targets: Tensor, vocab_local: int, tp: TensorParallel) -> tuple[Tensor, Tensor | float]:
    """(row of this rank's part of the vocabulary, 1 where the target is in it, else 0 and any row)."""
    if tp.size == 1:
        return targets, 1.0
    local = targets - tp.rank * vocab_local
    here = (local >= 0) & (local < vocab_local)
    return local.clamp(0, vocab_local - 1), here.float()


def _over_vocabulary(
    highest: Tensor, total: Tensor, target_logit: Tensor, tp: TensorParallel
) -> tuple[Tensor, Tensor, Tensor]:
    """(log Z, the target's logit, factor that makes this rank's exponentials probabilities), each [tokens,
    1]."""
    if tp.size == 1:
        return total.log() + highest, target_logit, 1 / total
    gathered, handle = gather_rows(torch.cat((highest, total, target_logit), dim=1), tp)
    handle.wait()
    tops, totals, logits = gathered.view(tp.size, -1, 3, 1).unbind(2)
    top = tops.amax(dim=0)
    log_z = (totals * (tops - top).exp()).sum(dim=0).log() + top
    return log_z, logits.sum(dim=0), (highest - log_z).exp()


def sums_per_modality(
    losses: Float[Tensor, " tokens"], weights: Float[Tensor, "modalities tokens"]
) -> Float[Tensor, " modalities"]:
    """Weighted sum of the losses of each modality; `weights` as in ModelInputs.loss_weights."""
    return weights @ losses
