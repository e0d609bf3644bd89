"""Held-out loss per modality, and how much better a part is predicted after its own condition.

The sequences are fixed: no seed, no layout and no arm of a comparison changes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipeline.batch import Batch, make_batch
from data_pipeline.index import TokenSource
from data_pipeline.vocabulary import Vocabulary
from parallel.engine import Engine
from pretrain.config import RunConfig
from pretrain.heldout import Text, heldout_texts, pack_texts, pair_text, pairs
from pretrain.metrics import losses
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.thresholds import Selection

Direction = tuple[str, str]


@dataclass(frozen=True)
class Heldout:
    """What one data-parallel rank evaluates. Every rank has equally many micro-batches."""

    modalities: tuple[str, ...]
    documents: tuple[ModelInputs, ...]
    own: Mapping[Direction, tuple[ModelInputs, ...]]
    """(a, b) -> parts b after their own part a; only the ids of b have weight."""
    foreign: Mapping[Direction, tuple[ModelInputs, ...]]
    """The same parts b after a part a of another document."""


def build_heldout(config: RunConfig, source: TokenSource, *, dp_rank: int, dp_size: int) -> Heldout:
    """Read and pack this rank's share of the held-out set. Raises ConfigError for a shard that is damaged."""
    context = config.model.context_tokens

    def share(texts: Sequence[Text], *, document_mask: bool = True) -> tuple[ModelInputs, ...]:
        return tuple(
            build_inputs(batch, config.model, document_mask=document_mask)
            for batch in micro_batches(
                pack_texts(texts, context),
                source.vocabulary,
                context_tokens=context,
                micro_batch_sequences=config.parallel.micro_batch_sequences,
                dp_rank=dp_rank,
                dp_size=dp_size,
            )
        )

    found = pairs(source, num_documents=config.evaluate.conditional_documents, context_tokens=context)
    texts = heldout_texts(source, num_sequences=config.evaluate.heldout_sequences, context_tokens=context)
    return Heldout(
        modalities=source.vocabulary.modalities,
        documents=share(texts, document_mask=config.data.document_mask),
        own={
            direction: share([pair_text(p.condition, p.target, p.name, source.vocabulary) for p in listed])
            for direction, listed in found.items()
        },
        foreign={
            direction: share([pair_text(p.foreign, p.target, p.name, source.vocabulary) for p in listed])
            for direction, listed in found.items()
        },
    )


def micro_batches(
    sequences: Sequence[Sequence[Text]],
    vocabulary: Vocabulary,
    *,
    context_tokens: int,
    micro_batch_sequences: int,
    dp_rank: int,
    dp_size: int,
) -> list[Batch]:
    """Sequences dp_rank, dp_rank + dp_size, ... as Batches of one shape; empty sequences fill the last."""
    per_rank = -(-len(sequences) // (dp_size * micro_batch_sequences)) * micro_batch_sequences
    mine = list(sequences[dp_rank::dp_size])
    mine += [[]] * (per_rank - len(mine))
    batches = []
    for first in range(0, per_rank, micro_batch_sequences):
        chosen = mine[first : first + micro_batch_sequences]
        batch = make_batch(
            [[text.ids for text in texts] for texts in chosen],
            sequence_tokens=context_tokens,
            vocabulary=vocabulary,
            samples=[[text.name for text in texts] for texts in chosen],
        )
        weights = np.zeros_like(batch.loss_weights)
        for row, texts in enumerate(chosen):
            counted = np.concatenate([text.weights for text in texts]) if texts else np.zeros(0, np.float32)
            weights[row, : len(counted)] = counted
        batches.append(replace(batch, loss_weights=weights))
    return batches


def selections(
    model: ModelConfig, thresholds: Mapping[str, float], progress: float
) -> list[tuple[str, Selection]]:
    """(prefix of metrics, what tokens are chosen by): the rule that the model is trained with, and where that
    looks at later tokens, its causal form: what a model that writes could do."""
    found = [("eval", Selection(thresholds=thresholds, progress=progress))]
    if not model.is_causal and model.has_causal_form:
        found.append(("eval/causal", replace(found[0][1], causal=True)))
    return found


TRAINED_WITH = Selection()
"""What models that choose no tokens are evaluated with."""


def heldout_losses(
    engine: Engine, heldout: Heldout, prefix: str = "eval", selection: Selection = TRAINED_WITH
) -> dict[str, float]:
    """`prefix`/loss and `prefix`/loss/<m>. Every rank calls it and gets the same."""
    if not heldout.documents:
        return {}
    return losses(_sums(engine, heldout, heldout.documents, selection), f"{prefix}/loss")


def conditional_losses(
    engine: Engine, heldout: Heldout, prefix: str = "eval", selection: Selection = TRAINED_WITH
) -> dict[str, float]:
    """`prefix`/loss/<a>_to_<b> and `prefix`/gain/<a>_to_<b>. Every rank calls it and gets the same."""
    row = {}
    for (a, b), inputs in heldout.own.items():
        own, weight = _sums(engine, heldout, inputs, selection)[b]
        foreign, _ = _sums(engine, heldout, heldout.foreign[a, b], selection)[b]
        if weight:  # spans can be empty
            row[f"{prefix}/loss/{a}_to_{b}"] = own / weight
            row[f"{prefix}/gain/{a}_to_{b}"] = (foreign - own) / weight
    return row


def _sums(
    engine: Engine, heldout: Heldout, inputs: Sequence[ModelInputs], selection: Selection
) -> dict[str, tuple[float, float]]:
    """modality -> (sum of nats, targets that count), over all ranks."""
    stats = engine.eval_step([replace(each, selection=selection) for each in inputs])
    count = len(heldout.modalities)
    return dict(zip(heldout.modalities, zip(stats[:count], stats[count:], strict=True), strict=True))
