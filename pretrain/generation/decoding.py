"""The decoder on a cache of keys: prompts in one pass, then token by token.

A pass is a micro-batch of one sequence, in which every text that is continued is a document: the layout of
training, without padding. So the decoder itself runs, and towers, experts and depth routers choose as they
do in training and evaluation; only attention looks further back (pretrain/generation/key_cache.py).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from data_pipeline.shards.index import Document
from data_pipeline.shards.vectors import of_sequences
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.batch import Batch, Vectors
from parallel.collectives import gather_columns
from pretrain.generation.key_cache import KeyCache
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState


def pass_inputs(
    texts: Sequence[Document],
    first_positions: Sequence[int],
    config: ModelConfig,
    vocabulary: Vocabulary,
    routing_state: RoutingState,
) -> ModelInputs:
    """Inputs of one pass on the host: texts[k] are tokens of document k, the first of them at position
    first_positions[k]. Vectors are clean."""
    counts = [len(text.ids) for text in texts]
    flat = np.concatenate([text.ids for text in texts]).astype(np.int32)[None]
    inside = [first + np.arange(count) for first, count in zip(first_positions, counts, strict=True)]
    batch = Batch(
        input_ids=flat,
        target_ids=np.zeros_like(flat),
        loss_weights=np.zeros(flat.shape, np.float32),
        positions=np.concatenate(inside).astype(np.int32)[None],
        document_ids=np.repeat(np.arange(len(counts), dtype=np.int32), counts)[None],
        input_modality=vocabulary.modality_of(flat),
        input_special=vocabulary.is_special(flat),
        target_modality=np.zeros(flat.shape, np.uint8),
        samples=((),),
        vectors={
            modality: Vectors(values, np.array([0, len(values)]))
            for modality, (values,) in of_sequences([[text.vectors for text in texts]], vocabulary).items()
        },
    )
    return build_inputs(batch, config, routing_state=routing_state, formats=vocabulary.vectors)


@torch.no_grad()
def read_tokens(
    decoder: Decoder,
    cache: KeyCache,
    sequences: Sequence[int],
    texts: Sequence[Document],
    vocabulary: Vocabulary,
    routing_state: RoutingState,
    *,
    report_ran: bool = False,
) -> tuple[Float[Tensor, "documents vocab"], RouterReport]:
    """Let sequences[k] read the tokens texts[k]; returns the logits behind the last token of each, and what
    routers report.

    Either the sequences are empty, or all read equally many tokens. The cache is extended in place.
    `report_ran`: as of ModelInputs.
    """
    starts = cache.lengths[list(sequences)].tolist()
    inputs = pass_inputs(texts, starts, decoder.config, vocabulary, routing_state)
    counts = [len(text.ids) for text in texts]
    past = cache.begin_pass(sequences, counts, inputs.mask.spans)
    inputs = replace(inputs, mask=replace(inputs.mask, past=past), report_ran=report_ran)
    device = next(decoder.parameters()).device
    hidden, report = decoder.hidden(inputs.to(device))
    return logits_at(decoder, hidden, inputs, np.cumsum(counts) - 1), report


def logits_at(
    decoder: Decoder, hidden: Float[Tensor, "tokens d_model"], inputs: ModelInputs, offsets: np.ndarray
) -> Float[Tensor, "offsets vocab"]:
    """Logits of the tokens at `offsets` in sequence order; `inputs` are on the host."""
    rows = inputs.routing.to_sequence.numpy()[offsets]
    order = np.argsort(rows)
    edges = np.searchsorted(rows[order], np.cumsum((0, *inputs.routing.counts)))
    chosen = replace(inputs.routing, counts=tuple(np.diff(edges).tolist()))
    assert decoder.head is not None
    logits = decoder.head(
        hidden.index_select(0, torch.from_numpy(rows[order]).to(hidden.device)),
        replace(inputs, routing=chosen),
    )
    assert isinstance(logits, Tensor)
    logits = gather_columns(logits, decoder.head.tp)
    return logits.index_select(0, torch.from_numpy(np.argsort(order)).to(logits.device))
