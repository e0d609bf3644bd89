"""What the decoder computes on: a Batch, sorted by tower on the host, as tensors."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.shards.vocabulary import VectorFormat
from data_pipeline.stream.batch import Batch
from parallel.routing import Routing, route, tokens_of_towers
from pretrain.models.accounting import later_pairs, visible_pairs
from pretrain.models.attention_mask import AttentionMask, mask_documents
from pretrain.models.config import ModelConfig
from pretrain.models.depth_selection import TokenTable, token_table
from pretrain.models.dropout import DropoutDraw
from pretrain.models.routing_state import RoutingState
from pretrain.models.vector_inputs import VectorInputs, vector_inputs


@dataclass(frozen=True)
class ModelInputs:
    """One micro-batch of T = B * S tokens, made by `build_inputs`. Sorted: by tower, see
    parallel/routing.py."""

    input_ids: Int[Tensor, " tokens"]
    """int64, sorted."""
    target_ids: Int[Tensor, " tokens"]
    """int64, sorted."""
    loss_weights: Float[Tensor, "modalities tokens"]
    """float32, sorted: a token's weight in the row of its target's modality, 0 in the others. A matrix, so
    that sums per modality are one product: deterministic on every device. All 0 where a vector is input or
    target: it is not predicted by next token."""
    positions: Int[Tensor, " tokens"]
    """int64, sorted: position within the document."""
    mask: AttentionMask
    """Sequence order."""
    routing: Routing
    weight_per_modality: tuple[float, ...]
    """Sum of each row of loss_weights, known on the host."""
    input_tokens: tuple[int, ...]
    """Inputs of each modality, padding left out."""
    visible_pairs: int
    """(query, key) pairs that attention may look at, padding left out; for the FLOPs ledger."""
    samples: tuple[tuple[str, ...], ...]
    """Per sequence, "shard/key" of its documents: for error messages."""
    table: TokenTable | None = None
    """On the host; only for models with depth routing."""
    routing_state: RoutingState = field(default_factory=RoutingState)
    """By what routers choose tokens."""
    dropout: DropoutDraw | None = None
    """Which masks a training step draws; None: nothing is dropped, as in evaluation."""
    report_ran: bool = False
    """Whether the forward pass also reports which tokens ran in blocks with depth routers."""
    modality_weights: Float[Tensor, " modalities"] | None = None
    """float32: weight of each modality's targets in the objective (RunConfig.loss_weights), a factor on
    loss_weights there and nowhere else. None: 1 for all."""
    vectors: Mapping[str, VectorInputs] = field(default_factory=dict)
    """Modality of vectors -> its vectors; all such modalities of the model."""
    images_weight: float = 0.0
    """This micro-batch's share of the normaliser in a step that predicts no id at all, where it is its number
    of images."""

    @property
    def weight(self) -> float:
        """Sum of all target_weights: this micro-batch's share of the normaliser. It is asked on the host."""
        if self.modality_weights is None:
            return sum(self.weight_per_modality) + self.images_weight
        pairs = zip(self.modality_weights.tolist(), self.weight_per_modality, strict=True)
        return sum(factor * weight for factor, weight in pairs) + self.images_weight

    @property
    def target_weights(self) -> Float[Tensor, " tokens"]:
        """Weight of each target in the objective, in sorted order and in the dtype of loss_weights."""
        if self.modality_weights is None:
            return self.loss_weights.sum(dim=0)
        weights = self.modality_weights.to(self.loss_weights.dtype)
        return (weights[:, None] * self.loss_weights).sum(dim=0)  # a matrix product might round to TF32

    @property
    def num_tokens(self) -> int:
        """Slots, padding included."""
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str) -> "ModelInputs":
        """All tensors on `device`, without waiting for the copies; the mask in the form of its attention
        kernel."""
        device = torch.device(device)

        def move(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and not tensor.is_cuda:
                tensor = tensor.pin_memory()  # a copy from pageable memory would wait
            return tensor.to(device, non_blocking=True)

        return replace(
            self,
            input_ids=move(self.input_ids),
            target_ids=move(self.target_ids),
            loss_weights=move(self.loss_weights),
            positions=move(self.positions),
            mask=self.mask.to(device),
            routing=self.routing.to(device),
            modality_weights=None if self.modality_weights is None else move(self.modality_weights),
            vectors={modality: of.to(move) for modality, of in self.vectors.items()},
        )


def build_inputs(
    batch: Batch,
    config: ModelConfig,
    *,
    document_mask: bool = True,
    routing_state: RoutingState | None = None,
    modality_weights: Sequence[float] | None = None,
    formats: Mapping[str, VectorFormat] | None = None,
) -> ModelInputs:
    """Sort a Batch by tower, on the host; with depth routing by modality, too. `document_mask` = False lets
    attention cross documents of a sequence. `routing_state`: of the step. `modality_weights`: weight of each
    modality's targets in the objective; None: 1 for all. `formats`: Vocabulary.vectors of the data; vectors
    are clean (vector_inputs.with_noise).

    The Batch's modality indices must follow the order of `config.towers`.
    """
    routing = route(
        batch.input_modality.reshape(-1),
        config.tower_of_modality,
        len(config.tower_names),
        by_modality=bool(config.depth),
    )
    order = routing.to_sorted.numpy()

    def sorted_flat(values: np.ndarray, dtype: type[np.generic]) -> np.ndarray:
        return values.reshape(-1)[order].astype(dtype)

    vectors = _vectors(batch, config, routing, formats or {})
    loss_weights = _loss_weights(batch, config, order)
    spans = [span for m in config.bidirectional for span in vectors[m].images.spans(batch.sequence_tokens)]

    mask = mask_documents(batch.document_ids, within=document_mask, spans=spans)
    padding = batch.document_ids < 0
    if config.experts:
        tokens = tokens_of_towers(routing.counts, order, ~padding.reshape(-1)[order], *padding.shape)
        routing = replace(routing, tokens=tokens)
    pairs = visible_pairs(_document_lengths(batch.document_ids, within=document_mask))
    pairs += later_pairs(end - first for first, end in spans)
    return ModelInputs(
        input_ids=torch.from_numpy(sorted_flat(batch.input_ids, np.int64)),
        target_ids=torch.from_numpy(sorted_flat(batch.target_ids, np.int64)),
        loss_weights=torch.from_numpy(loss_weights),
        positions=torch.from_numpy(sorted_flat(batch.positions, np.int64)),
        mask=mask,
        routing=routing,
        weight_per_modality=tuple(loss_weights.sum(axis=1, dtype=np.float64).tolist()),
        input_tokens=tuple(
            np.bincount(batch.input_modality[~padding], minlength=len(config.modalities)).astype(int).tolist()
        ),
        visible_pairs=pairs,
        samples=batch.samples,
        table=token_table(batch, routing, mask) if config.depth else None,
        routing_state=routing_state or RoutingState(),
        modality_weights=None if modality_weights is None else torch.tensor(modality_weights),
        vectors=vectors,
    )


def _loss_weights(
    batch: Batch, config: ModelConfig, order: Int[np.ndarray, " tokens"]
) -> Float[np.ndarray, "modalities tokens"]:
    """ModelInputs.loss_weights of a batch, whose slots are sorted by `order`."""
    weights = batch.loss_weights.reshape(-1)[order].astype(np.float32)
    target_modality = batch.target_modality.reshape(-1)[order].astype(np.int64)
    loss_weights = np.zeros((len(config.modalities), weights.size), np.float32)
    loss_weights[target_modality, np.arange(weights.size)] = weights
    input_modality = batch.input_modality.reshape(-1)[order]
    for number in (config.modalities.index(modality) for modality in config.vectors):
        loss_weights[:, input_modality == number] = 0
        loss_weights[number] = 0
    return loss_weights


def _vectors(
    batch: Batch, config: ModelConfig, routing: Routing, formats: Mapping[str, VectorFormat]
) -> dict[str, VectorInputs]:
    """The vectors of every modality that has some in the model."""
    unknown = batch.vectors.keys() - config.vectors.keys()
    assert not unknown, f"the batch has vectors of {unknown}, the model has none"
    return {
        modality: vector_inputs(
            batch,
            modality,
            config.modalities.index(modality),
            routing.to_sequence.numpy(),
            config.vectors[modality],
            formats.get(modality),
            len(config.modalities),
        )
        for modality in config.modalities
        if modality in config.vectors
    }


def _document_lengths(document_ids: np.ndarray, *, within: bool) -> list[int]:
    """Tokens of each document, or of each sequence if attention may cross documents; padding left out."""
    filled = (document_ids >= 0).sum(axis=1)
    if not within:
        return filled.tolist()
    return [int(n) for row in document_ids for n in np.bincount(row[row >= 0])]
