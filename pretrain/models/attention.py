"""Attention within documents, causal but for images that see themselves whole: projections per tower,
softmax over the tokens of all modalities."""

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from parallel.collectives import ONE_RANK, TensorParallel, sum_gradient
from parallel.routing import Routing, sequence_to_sorted, sorted_to_sequence
from parallel.towers import TowerColumnParallelLinear, TowerRowParallelLinear
from pretrain.models.attention_mask import AttentionMask, QueryMask
from pretrain.models.config import ModelConfig
from pretrain.models.depth_selection import ChosenTokens
from pretrain.models.initial_weights import InitialWeights
from pretrain.models.query_key import NormRotate, Rotary


class Attention(nn.Module):
    """Grouped-query attention. Rows of the fused QKV are query heads, then key heads, then value heads, and
    each tensor-parallel rank has its part of each."""

    def __init__(
        self, config: ModelConfig, name: str, weights: InitialWeights, *, tp: TensorParallel = ONE_RANK
    ) -> None:
        super().__init__()
        whole = (config.num_heads, config.kv_heads, config.kv_heads)
        heads, kv_heads = config.num_heads // tp.size, config.kv_heads // tp.size
        self.heads, self.head_dim = (heads, kv_heads, kv_heads), config.head_dim
        self.qkv = TowerColumnParallelLinear(
            config.d_model,
            sum(whole) * config.head_dim,
            config.shards_of("qkv"),
            weights.normal(f"{name}.qkv"),
            blocks=[count * config.head_dim for count in whole],
            bias=config.qkv_bias,
            tp=tp,
        )
        self.qk = NormRotate(
            config.head_dim,
            heads,
            kv_heads,
            config.shards_of("qk_norm"),
            norm=config.query_key_norm,
            eps=config.query_key_eps,
            tp=tp,
        )
        self.out = TowerRowParallelLinear(
            config.num_heads * config.head_dim,
            config.d_model,
            config.shards_of("attention_out"),
            weights.residual(f"{name}.out"),
            tp=tp,
        )
        self.name = name

    def forward(
        self, x: Float[Tensor, "rows d_model"], routing: Routing, mask: AttentionMask, rotary: Rotary
    ) -> Float[Tensor, "rows d_model"]:
        """`x`, `rotary` and the result are sorted by tower; `mask` is in sequence order."""
        qkv = self.qk(self.qkv(x, routing.counts), routing, rotary)
        if mask.past is None:
            seen = attend(qkv, mask, self.heads)
        else:
            seen = mask.past.attend(self.name, qkv, mask, self.heads)
        return self.out(sequence_to_sorted(seen, routing), routing.counts)

    def of_queries(
        self,
        queries: Float[Tensor, "chosen d_model"],
        chosen: ChosenTokens,
        x: Float[Tensor, "tokens d_model"],
        routing: Routing,
        rotary: Rotary,
    ) -> Float[Tensor, "chosen d_model"]:
        """The same for chosen rows of `x` alone, over keys and values of all of them. Without sequence
        parallel."""
        (heads, kv_heads, _), counts = self.heads, routing.counts
        queries, x = (sum_gradient(each, self.qkv.tp) for each in (queries, x))
        q, k, v = self.qkv.in_parts(
            (queries, x, x),
            (chosen.routing.counts, counts, counts),
            [count * self.head_dim for count in self.heads],
        )
        q = self.qk(q, chosen.routing, rotary.index_select(0, chosen.rows), heads=(heads, 0))
        k = self.qk(k, routing, rotary, heads=(0, kv_heads))
        assert isinstance(chosen.mask, QueryMask)
        v, mask = sorted_to_sequence(v, routing), chosen.mask
        if mask.past is None:
            seen = attend_queries(q, k, v, mask, self.heads)
        else:
            seen = mask.past.attend_queries(self.name, q, k, v, mask, self.heads)
        return self.out(sequence_to_sorted(seen, chosen.routing), chosen.routing.counts)


def attend(
    qkv: Float[Tensor, "tokens features"], mask: AttentionMask, heads: tuple[int, int, int]
) -> Float[Tensor, "tokens query_features"]:
    """softmax(q k / sqrt(head_dim)) v over the keys that `mask` shows to each query; in sequence order.

    `heads`: how many query, key and value heads make up a row of `qkv`.
    """
    if mask.block_mask is not None:
        kernel = _compiled_flex() if qkv.is_cuda else flex_attention
        q, k, v = _heads_first(qkv, mask.documents.shape[0], heads)
        return _rows(kernel(q, k, v, block_mask=mask.block_mask, enable_gqa=heads[0] != heads[1]))
    # One causal SDPA per document, or one for all if they are equally long. Measured on CPU in training, with
    # documents of 30-200 tokens in contexts of 512: 2.2 times as fast as one call with a materialised mask.
    segments = mask.segments
    if not segments:  # of chosen tokens: there is none
        return qkv[:, : qkv.shape[1] * heads[0] // sum(heads)]
    if len(set(segments)) == 1:
        seen = _attend_causal(qkv, len(segments), heads)
    else:
        seen = torch.cat([_attend_causal(piece, 1, heads) for piece in qkv.split(segments)])
    return _with_whole_images(seen, qkv, mask.spans, heads) if mask.spans else seen


def _with_whole_images(
    seen: Tensor, qkv: Tensor, spans: Sequence[tuple[int, int, int]], heads: tuple[int, int, int]
) -> Tensor:
    """`seen` of causal attention, with the rows of images replaced, which see all from the start of their
    document to their own last vector. `spans`: as of AttentionMask."""
    edges = [0, *(edge for _, *span in spans for edge in span), qkv.shape[0]]
    sizes = [end - first for first, end in pairwise(edges)]  # before, inside, before, inside, ..., behind
    width = qkv.shape[1] // sum(heads)
    q, k, v = qkv.split([count * width for count in heads], dim=1)
    seen_keys = [(document, end) for document, _, end in spans]
    pieces = list(seen.split(sizes))
    images = zip(q.split(sizes)[1::2], _Spans.apply(k, seen_keys), _Spans.apply(v, seen_keys), strict=True)
    for number, of_image in enumerate(images):
        queries, keys, values = map(_one_document, of_image, heads)
        out = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=heads[0] != heads[1])
        pieces[2 * number + 1] = _rows(out)
    return torch.cat(pieces)


def attend_queries(
    q: Float[Tensor, "chosen query_features"],
    k: Float[Tensor, "tokens kv_features"],
    v: Float[Tensor, "tokens kv_features"],
    mask: QueryMask,
    heads: tuple[int, int, int],
) -> Float[Tensor, "chosen query_features"]:
    """Return attention as `attend`, for queries at some of the tokens; all inputs are in sequence order."""
    grouped = heads[0] != heads[1]
    if mask.block_mask is not None and q.shape[0]:
        kernel = _compiled_flex() if q.is_cuda else flex_attention
        q, k, v = map(_one_document, (q, k, v), heads)
        return _rows(kernel(q, k, v, block_mask=mask.block_mask, enable_gqa=grouped))
    sizes, spans = query_pieces(mask)
    outs = [q[:0]]
    pieces = zip(
        *(q.split(sizes), _Spans.apply(k, spans), _Spans.apply(v, spans), mask.last.split(sizes), spans),
        strict=True,
    )
    for *qkv, last, (first, end) in pieces:
        queries, keys, values = map(_one_document, qkv, heads)
        at = torch.arange(first, end, device=q.device)
        causal = torch.equal(at, last.long())  # a query at every key, and no image that sees itself whole
        seen = None if causal else at <= last[:, None]
        out = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=seen, is_causal=causal, enable_gqa=grouped
        )
        outs.append(_rows(out))
    return torch.cat(outs)


_PIECE = 192
"""Queries of one call. With more calls fewer pairs are computed in vain, but torch 2.13's kernel for CPUs
works on 64 queries at a time from 192 on, and on 32 where there are fewer."""


def query_pieces(mask: QueryMask) -> tuple[list[int], list[tuple[int, int]]]:
    """Numbers of queries to be taken together, and (first, end) of the keys that they look at: from the start
    of their document to the last of them."""
    sizes: list[int] = []
    spans, first, start = [], 0, 0
    causal = torch.equal(mask.last, mask.offsets)
    for queries, tokens in mask.lengths:
        # All tokens of a document are causal attention, for which the kernel needs no mask. A rest comes
        # first: there it looks at the fewest keys, whose gradients each piece adds up.
        full, rest = (0, queries) if queries == tokens and causal else divmod(queries, _PIECE)
        for size in [rest] * (rest > 0) + [_PIECE] * full:
            start += size
            sizes.append(size)
            spans.append((first, int(mask.last[start - 1]) + 1))
        first += tokens
    return sizes, spans


class _Spans(torch.autograd.Function):
    """x[first:end] of each span; of each document the longest comes last. By hand, because autograd's
    gradient of a slice is as large as the whole."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spans: Sequence[tuple[int, int]]) -> tuple[Tensor, ...]:
        ctx.spans, ctx.shape = spans, x.shape
        return tuple(x[first:end] for first, end in spans)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total, done = grads[0].new_empty(ctx.shape), ctx.shape[0]
        for (first, end), grad in zip(reversed(ctx.spans), reversed(grads), strict=True):
            if end <= done:  # the longest of its document
                total[first:end] = grad
                total[end:done], done = 0.0, first
            else:
                total[first:end] += grad
        total[:done] = 0.0
        return total, None


def _attend_causal(qkv: Tensor, documents: int, heads: tuple[int, int, int]) -> Tensor:
    """Causal attention inside each of `documents` documents of equal length."""
    q, k, v = _heads_first(qkv, documents, heads)
    return _rows(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads[0] != heads[1]))


def _heads_first(qkv: Tensor, documents: int, heads: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Views of q, k and v as [documents, heads, tokens, head_dim]."""
    q, k, v = (
        qkv.unflatten(1, (sum(heads), -1)).unflatten(0, (documents, -1)).transpose(1, 2).split(heads, dim=1)
    )
    return q, k, v


def _one_document(x: Tensor, count: int) -> Tensor:
    """View of `count` heads as [1, heads, tokens, head_dim]."""
    return x.unflatten(1, (count, -1)).transpose(0, 1).unsqueeze(0)


def _rows(out: Tensor) -> Tensor:
    """[documents, heads, tokens, head_dim] as [all tokens, features]."""
    return out.transpose(1, 2).flatten(2).flatten(0, 1)


@cache
def _compiled_flex() -> Any:
    """Flex attention keeps no matrix of scores only when compiled."""
    return torch.compile(flex_attention)
