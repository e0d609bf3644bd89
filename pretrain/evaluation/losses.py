"""Held-out losses per modality, and conditional losses of a part of a document given another part.

The sequences do not depend on the seed, the layout or the arm of a comparison.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from jaxtyping import Bool

from data_pipeline.shards.index import TokenSource
from data_pipeline.shards.vectors import of_sequences
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.stream.batch import Batch, make_batch
from parallel.world import World
from pretrain.config import RunConfig
from pretrain.evaluation.documents import Text, fingerprint, heldout_texts, pack_texts, pair_text, pairs
from pretrain.evaluation.selection_picture import IMAGE
from pretrain.metrics import losses
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
        batches = micro_batches(
            pack_texts(texts, context), source.vocabulary, config, dp_rank=dp_rank, dp_size=dp_size
        )
        return tuple(build_inputs(batch, config.model, document_mask=document_mask) for batch in batches)

    pairs_of = pairs(source, num_documents=config.evaluate.conditional_documents, context_tokens=context)
    texts = heldout_texts(source, num_sequences=config.evaluate.heldout_sequences, context_tokens=context)
    return Heldout(
        modalities=source.vocabulary.modalities,
        documents=share(texts, document_mask=config.data.document_mask),
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
    batches = micro_batches([[text] for text in chosen], source.vocabulary, config)
    return HeldoutImages(source, tuple(chosen), tuple(build_inputs(batch, config.model) for batch in batches))


def micro_batches(
    sequences: Sequence[Sequence[Text]],
    vocabulary: Vocabulary,
    config: RunConfig,
    *,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> list[Batch]:
    """Sequences dp_rank, dp_rank + dp_size, ... in batches of one shape; the last has empty sequences."""
    size = config.parallel.micro_batch_sequences
    per_rank = -(-len(sequences) // (dp_size * size)) * size
    own = list(sequences[dp_rank::dp_size])
    own += [[]] * (per_rank - len(own))
    batches = []
    for first in range(0, per_rank, size):
        chosen = own[first : first + size]
        batch = make_batch(
            [[text.ids for text in texts] for texts in chosen],
            sequence_tokens=config.model.context_tokens,
            vocabulary=vocabulary,
            samples=[[text.name for text in texts] for texts in chosen],
            vectors=of_sequences([[text.vectors for text in texts] for texts in chosen], vocabulary),
        )
        weights = np.zeros_like(batch.loss_weights)
        for row, texts in enumerate(chosen):
            counted = np.concatenate([text.weights for text in texts]) if texts else np.zeros(0, np.float32)
            weights[row, : len(counted)] = counted
        batches.append(replace(batch, loss_weights=weights))
    return batches


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
    """`prefix`/loss and `prefix`/loss/<m>. All ranks call it and get the same result."""
    if not heldout.documents:
        return {}
    return losses(_sums(engine, heldout, heldout.documents, routing_state), f"{prefix}/loss")


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
    engine: Evaluates, heldout: Heldout, inputs: Sequence[ModelInputs], routing_state: RoutingState
) -> dict[str, TargetSums]:
    """By modality, the sums over its targets of all ranks."""
    stats, _ = engine.eval_step([replace(batch, routing_state=routing_state) for batch in inputs])
    return modality_sums.unpack(stats, heldout.modalities)
