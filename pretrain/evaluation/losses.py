"""Held-out losses per modality, and conditional losses of a part of a document given another part.

The sequences do not depend on the seed, the layout or the arm of a comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vectors import of_sequences
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.batch import Batch, make_batch
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.evaluation.documents import (
    Text,
    fingerprint,
    heldout_texts,
    numbered,
    pack_texts,
    pair_text,
    pairs,
)
from pretrain.evaluation.image_noise import by_time, time_rows, with_fixed_noise
from pretrain.evaluation.selection_picture import IMAGE
from pretrain.metric_rows import losses
from pretrain.models import modality_sums
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.modality_sums import TargetSums
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState

if TYPE_CHECKING:
    from pretrain.evaluation.document_sums import HeldoutDocuments

Direction = tuple[str, str]


class Evaluates(Protocol):
    """An engine, or a decoder in one process: what `eval_step` of parallel.engine.Engine says."""

    def eval_step(self, micro_batches: Sequence[Any]) -> tuple[list[float], Any]: ...


IMAGES_DRAWN = 4
"""Number of held-out images that TensorBoard shows."""


@dataclass(frozen=True)
class Heldout:
    """The held-out data of one data-parallel rank. All ranks have equally many micro-batches."""

    modalities: tuple[str, ...]
    documents: tuple[ModelInputs, ...]
    own: Mapping[Direction, tuple[ModelInputs, ...]]
    """By direction (a, b), parts b after the part a of the same document; only the ids of b have weight."""
    foreign: Mapping[Direction, tuple[ModelInputs, ...]]
    """By direction (a, b), the same parts b after a part a of another document."""
    images: "HeldoutImages | None" = None
    fingerprint: str | None = None
    """64 bits in hex over all that was read, by all ranks; None if there is nothing."""
    last: "HeldoutDocuments | None" = None
    """The documents whose losses the last evaluation keeps one by one; None if it keeps none."""
    image_weights: Mapping[str, float] = field(default_factory=dict)
    """Weights of images in `prefix`/loss (RunConfig.image_weights)."""


@dataclass(frozen=True)
class HeldoutImages:
    """Texts whose images TensorBoard shows; they are the same on every rank."""

    source: TokenSource
    texts: tuple[Text, ...]
    inputs: tuple[ModelInputs, ...]
    """Inputs of the texts, with one text per sequence."""


def build_heldout(config: RunConfig, source: TokenSource, *, dp_rank: int, dp_size: int) -> Heldout:
    """Read and pack this rank's share of the held-out set. Raises ConfigError for a corrupt shard."""
    context = config.model.context_tokens

    def share(texts: Sequence[Text], *, document_mask: bool = True) -> tuple[ModelInputs, ...]:
        sequences = pack_texts(numbered(texts), context)
        shares = micro_batches(sequences, config, dp_rank=dp_rank, dp_size=dp_size)
        return tuple(inputs_of(s, source.vocabulary, config, document_mask=document_mask) for s in shares)

    pairs_of = pairs(source, num_documents=config.evaluate.conditional_documents, context_tokens=context)
    texts = heldout_texts(source, num_sequences=config.evaluate.heldout_sequences, context_tokens=context)
    documents = share(texts, document_mask=config.data.document_mask)
    return Heldout(
        modalities=source.vocabulary.modalities,
        documents=tuple(by_time(inputs, config.model) for inputs in documents),
        own={
            direction: share([pair_text(p.condition, p, source.vocabulary) for p in listed])
            for direction, listed in pairs_of.items()
        },
        foreign={
            direction: share([pair_text(p.foreign, p, source.vocabulary) for p in listed])
            for direction, listed in pairs_of.items()
        },
        images=images_of(texts, source, config, IMAGES_DRAWN),
        fingerprint=fingerprint(texts, pairs_of),
        image_weights=config.image_weights,
    )


def images_of(
    texts: Sequence[Text], source: TokenSource, config: RunConfig, count: int
) -> HeldoutImages | None:
    """The first `count` texts with an image; None if there are none, or if the model routes no images."""
    if IMAGE not in config.model.depth or IMAGE not in source.vocabulary.modalities:
        return None
    opening, _ = source.vocabulary.delimiters(IMAGE)
    chosen = [text for text in texts if opening in text.ids][:count]
    if not chosen:
        return None
    shares = micro_batches([[text] for text in chosen], config)
    inputs = tuple(inputs_of(share, source.vocabulary, config) for share in shares)
    return HeldoutImages(source, tuple(chosen), inputs)


def micro_batches(
    sequences: Sequence[Sequence[Text]], config: RunConfig, *, dp_rank: int = 0, dp_size: int = 1
) -> list[list[Sequence[Text]]]:
    """Sequences dp_rank, dp_rank + dp_size, ... in micro-batches of one size; the last has empty ones."""
    size = config.parallel.micro_batch_sequences
    per_rank = -(-len(sequences) // (dp_size * size)) * size
    own = list(sequences[dp_rank::dp_size])
    own += [[]] * (per_rank - len(own))
    return [own[first : first + size] for first in range(0, per_rank, size)]


def batch_of(sequences: Sequence[Sequence[Text]], vocabulary: Vocabulary, config: RunConfig) -> Batch:
    """The texts of one micro-batch."""
    batch = make_batch(
        [[text.ids for text in texts] for texts in sequences],
        sequence_tokens=config.model.context_tokens,
        vocabulary=vocabulary,
        samples=[[text.name for text in texts] for texts in sequences],
        vectors=of_sequences([[text.vectors for text in texts] for texts in sequences], vocabulary),
    )
    weights = np.zeros_like(batch.loss_weights)
    for row, texts in enumerate(sequences):
        counted = np.concatenate([text.weights for text in texts]) if texts else np.zeros(0, np.float32)
        weights[row, : len(counted)] = counted
    return replace(batch, loss_weights=weights)


def inputs_of(
    sequences: Sequence[Sequence[Text]],
    vocabulary: Vocabulary,
    config: RunConfig,
    *,
    document_mask: bool = True,
) -> ModelInputs:
    """Inputs of one micro-batch, with the fixed noise of its texts on their images."""
    batch = batch_of(sequences, vocabulary, config)
    inputs = build_inputs(batch, config.model, document_mask=document_mask, formats=vocabulary.vectors)
    return with_fixed_noise(inputs, config.model, [[text.number for text in texts] for texts in sequences])


def routing_states(
    model: ModelConfig, thresholds: Mapping[str, float], progress: float
) -> list[tuple[str, RoutingState]]:
    """(prefix of metrics, routing state) of the evaluations of a model.

    The first is the rule of training. If that looks at later tokens, the second is its causal form, which a
    model could use to generate.
    """
    states = [("eval", RoutingState(thresholds=thresholds, progress=progress))]
    if not model.is_causal and model.has_causal_form:
        states.append(("eval/causal", replace(states[0][1], causal=True)))
    return states


TRAINED_WITH = RoutingState()
"""The routing state for models that choose no tokens."""


def heldout_losses(
    engine: Evaluates, heldout: Heldout, prefix: str = "eval", routing_state: RoutingState = TRAINED_WITH
) -> dict[str, float]:
    """`prefix`/loss and `prefix`/loss/<m>, and `prefix`/loss/<m>/time_<quarter> of images. All ranks call it
    and get the same result."""
    if not heldout.documents:
        return {}
    rows = time_rows(heldout.image_weights)
    sums = _sums(engine, heldout, heldout.documents, routing_state, rows)
    of_times = losses({name: sums.pop(name) for name in rows}, f"{prefix}/loss")
    of_times.pop(f"{prefix}/loss", None)
    return losses(sums, f"{prefix}/loss", heldout.image_weights) | of_times


def conditional_losses(
    engine: Evaluates, heldout: Heldout, prefix: str = "eval", routing_state: RoutingState = TRAINED_WITH
) -> dict[str, float]:
    """`prefix`/loss/<a>_to_<b> and `prefix`/gain/<a>_to_<b>. All ranks call it and get the same result."""
    row = {}
    for (a, b), inputs in heldout.own.items():
        own, weight = _sums(engine, heldout, inputs, routing_state)[b]
        foreign, _ = _sums(engine, heldout, heldout.foreign[a, b], routing_state)[b]
        if weight:  # 0 if all parts b are empty
            row[f"{prefix}/loss/{a}_to_{b}"] = own / weight
            row[f"{prefix}/gain/{a}_to_{b}"] = (foreign - own) / weight
    return row


def tokens_that_ran(
    report_of: Callable[[Sequence[ModelInputs]], RouterReport],
    images: HeldoutImages,
    routing_state: RoutingState,
    world: World | None = None,
) -> dict[int, Bool[np.ndarray, "texts tokens"]]:
    """By layer with a router for images, the tokens of `images` that ran.

    `report_of` returns what routers report of a forward pass of a list of inputs. All ranks of `world` call
    it, since layers may be on several stages.
    """
    report = report_of([replace(i, routing_state=routing_state, report_ran=True) for i in images.inputs])
    own = {layer: block.ran for layer, block in report.layers.items() if IMAGE in block.depth}
    stages = [own] if world is None else world.gather(own, world.model_group)
    return {layer: np.concatenate(ran) for stage in stages for layer, ran in stage.items()}


def _sums(
    engine: Evaluates,
    heldout: Heldout,
    inputs: Sequence[ModelInputs],
    routing_state: RoutingState,
    rows: Mapping[str, str] | None = None,
) -> dict[str, TargetSums]:
    """By modality, the sums over its targets of all ranks; and by name of a further row, which count to its
    modality too. `rows`: name of each further row -> its modality."""
    stats, _ = engine.eval_step([replace(batch, routing_state=routing_state) for batch in inputs])
    rows = rows or {}
    sums = modality_sums.unpack(stats, (*heldout.modalities, *rows))
    for name, modality in rows.items():
        pairs = zip(sums[modality], sums[name], strict=True)
        sums[modality] = TargetSums(*(total + more for total, more in pairs))
    return sums
