"""Sums of losses per held-out document, which the last evaluation of a run keeps (documents.json).

A document's losses of two runs are paired, so that a comparison can tell how far a difference would move with
other documents (pretrain/comparison/document_variance.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float

from data_pipeline.shards.index import TokenSource
from parallel.engine import Engine
from pretrain.config import RunConfig
from pretrain.evaluation.documents import first_texts, numbered, pack_texts
from pretrain.evaluation.losses import batch_of, inputs_of, micro_batches
from pretrain.metric_rows import losses
from pretrain.models.inputs import ModelInputs
from pretrain.models.routing_state import RoutingState
from pretrain.run_files import DOCUMENTS_FORMAT


@dataclass(frozen=True)
class DocumentBatch:
    """One micro-batch of this rank, and the documents of the micro-batches that all ranks bring with it.

    Its loss_weights have a row for every pair of a text and a modality, in place of a row for every modality,
    so that a forward pass sums losses per text.
    """

    inputs: ModelInputs
    documents: tuple[int, ...]
    """By text of all ranks, the number of its document."""


@dataclass(frozen=True)
class HeldoutDocuments:
    """The documents whose losses are kept one by one. All ranks have equally many batches."""

    names: tuple[str, ...]
    """Names of the documents, "shard/key", in their fixed order."""
    modalities: tuple[str, ...]
    batches: tuple[DocumentBatch, ...]


@dataclass(frozen=True)
class DocumentSums:
    """Sums over the targets of every document and modality."""

    targets: Float[np.ndarray, "modalities documents"]
    nats: Float[np.ndarray, "modalities documents"]


def build_documents(
    config: RunConfig, source: TokenSource, *, dp_rank: int, dp_size: int
) -> HeldoutDocuments | None:
    """Read and pack this rank's share of the documents of the last evaluation; None if none are asked for.

    Raises ConfigError for a corrupt shard.
    """
    if config.evaluate.last_documents is None:
        return None
    context, size = config.model.context_tokens, config.parallel.micro_batch_sequences
    asked = config.evaluate.last_documents
    texts = numbered(first_texts(source, num_documents=asked, context_tokens=context))
    names = tuple(dict.fromkeys(text.name for text in texts))
    number = {name: i for i, name in enumerate(names)}
    sequences = pack_texts(texts, context)
    out = []
    for k, share in enumerate(micro_batches(sequences, config, dp_rank=dp_rank, dp_size=dp_size)):
        together = sequences[k * size * dp_size : (k + 1) * size * dp_size]
        first = np.cumsum([0, *(len(texts) for texts in together)])
        own = [first[min(dp_rank + dp_size * j, len(together))] for j in range(size)]
        numbers = batch_of(share, source.vocabulary, config).document_ids
        slots = np.where(numbers < 0, 0, numbers + np.array(own)[:, None])
        inputs = inputs_of(share, source.vocabulary, config, document_mask=config.data.document_mask)
        documents = tuple(number[text.name] for texts in together for text in texts)
        out.append(DocumentBatch(_per_text(inputs, slots, len(documents)), documents))
    return HeldoutDocuments(names, source.vocabulary.modalities, tuple(out))


def _per_text(inputs: ModelInputs, slots: np.ndarray, num_texts: int) -> ModelInputs:
    """The inputs with a row of loss_weights for every text and modality. `slots`: number of the text of every
    token, [sequences, tokens]."""

    def rows(weights: torch.Tensor, of: np.ndarray) -> torch.Tensor:
        """The rows of `weights` [modalities, n] for each text, where entry i belongs to text of[i]."""
        spread = np.zeros((num_texts, *weights.shape), np.float32)
        spread[of, :, np.arange(len(of))] = weights.numpy().T
        return torch.from_numpy(spread.reshape(num_texts * len(weights), len(of)))

    vectors = {
        m: replace(v, weights=rows(v.weights, slots[v.images.sequence, v.images.position]))
        for m, v in inputs.vectors.items()
    }
    of_token = slots.reshape(-1)[inputs.routing.to_sorted.numpy()]
    return replace(inputs, loss_weights=rows(inputs.loss_weights, of_token), vectors=vectors)


def document_sums(engine: Engine, heldout: HeldoutDocuments, routing_state: RoutingState) -> DocumentSums:
    """The sums of every document. All ranks call it and get the same."""
    shape = len(heldout.modalities), len(heldout.names)
    nats, targets = np.zeros(shape), np.zeros(shape)
    for batch in heldout.batches:
        stats, _ = engine.eval_step([replace(batch.inputs, routing_state=routing_state)])
        both = np.array(stats).reshape(2, len(batch.documents), len(heldout.modalities))
        for total, of_texts in zip((nats, targets), both, strict=True):
            np.add.at(total.T, list(batch.documents), of_texts)
    return DocumentSums(targets, nats)


def to_json(
    heldout: HeldoutDocuments, sums: Mapping[str, DocumentSums], *, step: int, fingerprint: str | None
) -> dict[str, object]:
    """The content of documents.json. `sums`: by prefix of metrics, such as "eval" and "eval/causal"."""
    first = next(iter(sums.values()))

    def by_modality(table: np.ndarray) -> dict[str, list[float]]:
        return {m: row.tolist() for m, row in zip(heldout.modalities, table, strict=True)}

    return {
        "format": DOCUMENTS_FORMAT,
        "step": step,
        "heldout_fingerprint": fingerprint,
        "documents": list(heldout.names),
        "targets": by_modality(first.targets),
        "nats": {prefix: by_modality(one.nats) for prefix, one in sums.items()},
    }


def losses_of(
    sums: DocumentSums,
    modalities: Sequence[str],
    prefix: str,
    image_weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """`prefix`/documents/loss and `prefix`/documents/loss/<m>: the loss per target over all documents.
    `image_weights`: as of pretrain.metric_rows.losses."""
    nats, targets = sums.nats.sum(axis=1).tolist(), sums.targets.sum(axis=1).tolist()
    pairs = dict(zip(modalities, zip(nats, targets, strict=True), strict=True))
    return losses(pairs, f"{prefix}/documents/loss", image_weights)
