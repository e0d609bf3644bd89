"""Log-likelihoods of continuations: what a model thinks of given ids behind given prompts."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int

from data_pipeline.shards.index import Document
from pretrain.generation.decoding import logits_at, pass_inputs
from pretrain.generation.trained_model import TrainedModel

Ids = Int[np.ndarray, " tokens"]
TOKENS_AT_ONCE = 16_384
"""Tokens of one pass; a longer text has a pass to itself."""


class Continuation(NamedTuple):
    """The likelihood of a continuation."""

    log_likelihood: float
    """In nats, summed over the ids."""
    is_greedy: bool
    """Whether each id is the likeliest of all."""


def continuations(model: TrainedModel, pairs: Sequence[tuple[Document, Ids]]) -> Iterator[Continuation]:
    """Yield the likelihoods of pairs (prompt, continuation behind it), in their order.

    Both have an id or more. A pair with all but its last id fits into the context. A continuation holds no
    vectors, which have no likelihood.
    """
    group: list[tuple[Document, Ids]] = []
    tokens = 0
    for pair in pairs:
        length = len(pair[0].ids) + len(pair[1]) - 1
        if group and tokens + length > TOKENS_AT_ONCE:
            yield from _in_one_pass(model, group)
            group, tokens = [], 0
        group.append(pair)
        tokens += length
    if group:
        yield from _in_one_pass(model, group)


@torch.no_grad()
def _in_one_pass(model: TrainedModel, pairs: Sequence[tuple[Document, Ids]]) -> list[Continuation]:
    texts = [np.concatenate((prompt.ids, continuation)) for prompt, continuation in pairs]
    read = [Document(text[:-1], prompt.vectors) for text, (prompt, _) in zip(texts, pairs, strict=True)]
    inputs = pass_inputs(
        read, [0] * len(texts), model.decoder.config, model.vocabulary,
        model.routing_state,
    )  # fmt: skip
    hidden, _ = model.decoder.hidden(inputs.to(next(model.decoder.parameters()).device))
    found, start = [], 0
    for text, (prompt, continuation) in zip(texts, pairs, strict=True):
        # Text by text, for the logits of all of them may be large.
        offsets = start + np.arange(len(prompt.ids) - 1, len(text) - 1)
        logits = logits_at(model.decoder, hidden, inputs, offsets).double().cpu()
        targets = torch.from_numpy(continuation)
        nats = logits.log_softmax(dim=1).gather(1, targets[:, None])
        found.append(Continuation(float(nats.sum()), bool((logits.argmax(dim=1) == targets).all())))
        start += len(text) - 1
    return found
