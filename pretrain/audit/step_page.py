"""`motley inspect data`: one page of what a step was trained on, which needs no network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.loss_mask import is_target
from data_pipeline.shards.spans import SpanError
from data_pipeline.shards.vectors import within
from data_pipeline.shards.vocabulary import Vocabulary
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.audit.contents import differing_rows
from pretrain.audit.report import pieces
from pretrain.audit.steps import ConsumedStep, RunData, consumed_steps, open_run
from pretrain.generation.page import shown_environment
from pretrain.generation.pieces import Piece, decode
from pretrain.run_tokenizers import tokenizers_of_run


@dataclass(frozen=True)
class ShownStretch:
    """Neighbouring ids of a document that are all targets, or all context."""

    is_target: bool
    pieces: Sequence[Piece]


@dataclass(frozen=True)
class ShownDocument:
    """A document of a sequence, or the piece of it that stands there."""

    source: str
    name: str
    place: str
    stretches: Sequence[ShownStretch]


@dataclass(frozen=True)
class ShownSequence:
    """One sequence as the page shows it."""

    number: int
    filled: int
    documents: Sequence[ShownDocument]


@dataclass(frozen=True)
class ModalityCounts:
    """A row of the page's table."""

    modality: str
    tokens: int
    targets: int
    weight: float
    """Of each of its targets in the objective (loss_weights of the run file)."""


def inspect_data(
    path: Path, step: int, out: Path | None, *, num_sequences: int, tokenizers: Path | None
) -> None:
    """Write the page of a step of a run, counted from 1, with its first `num_sequences` sequences.

    `out`: None stands for a file in the run directory. Behind the last step that the run made, `step` may be
    the next one. Raises ConfigError.
    """
    run = open_run(path)
    made = run.went[-1].step if run.went else 0
    if not 1 <= step <= made + 1:
        raise ConfigError(f"--step {step}: {run.folder} has made steps 1 ... {made}; legal: 1 ... {made + 1}")
    opened = tokenizers_of_run(run.folder, run.config, tokenizers)
    consumed = list(consumed_steps(run, more=1))
    chosen = max(
        (place for place, s in enumerate(consumed) if s.went.step == step), default=len(consumed) - 1
    )
    about = [*_about(run, consumed, chosen), _fingerprint_line(run, consumed, step)]
    plan = consumed[chosen]
    sequences = _sequences(run, plan, num_sequences, opened)
    if len(plan.plan) > len(sequences):
        about.append(f"shown: the first {len(sequences)} of {len(plan.plan)} sequences (--sequences)")
    title = f"{run.config.name}, step {step}: what it was trained on"
    template = shown_environment(Path(__file__).parent).get_template("step_page.html.j2")
    text = template.render(title=title, about=about, rows=_counts(run, plan), sequences=sequences)
    out = out or run.folder / f"data_step_{step:08d}.html"
    with atomic_file(out) as file:
        file.write(text.encode())
    print(f"{out}: {len(sequences)} sequences of step {step}")


def _about(run: RunData, consumed: Sequence[ConsumedStep], chosen: int) -> list[str]:
    """Lines on a step: which part of the stream it is, and what became of it."""
    step = consumed[chosen]
    first, size = step.first_sequence, len(step.plan)
    lines = [f"sequences {first} ... {first + size - 1} of the stream, of {run.stream.context_tokens} tokens"]
    if chosen >= len(run.went):
        lines.append("the run has not made this step: it is what comes next")
    elif not step.went.is_kept:
        lines.append("a spike: its update is not in the weights")
    if more := sum(other.went.step == step.went.step for other in consumed[:chosen]):
        lines.append(f"the last of {more + 1} times that the run made this step; it went back after spikes")
    for number, source in enumerate(run.stream.sources):
        own = step.plan.source == number
        count, slots = len(np.unique(step.plan.document[own])), int(step.plan.slots[own].sum())
        lines.append(f"{source.folder}: {count} documents, {slots:,} tokens")
    return lines


def _fingerprint_line(run: RunData, consumed: Sequence[ConsumedStep], step: int) -> str:
    """Say whether the rows of metrics bear out that this step was trained on these bytes."""
    rows = [(row, agrees) for row, agrees in differing_rows(run, consumed[: len(run.went)]) if row >= step]
    if not rows:
        return "no row of metrics comes behind this step, so its bytes are those of the plan, unconfirmed"
    row, agrees = rows[0]
    if agrees:
        return f"the fingerprint of step {row} confirms that ranks read these bytes"
    return f"DIFFERS: the fingerprint of step {row} is of other bytes; `motley audit` says since when"


def _counts(run: RunData, step: ConsumedStep) -> list[ModalityCounts]:
    """Tokens, targets and the weight of a target, by modality, over the whole step."""
    vocabulary = run.stream.vocabulary
    tokens, targets = (np.zeros(len(vocabulary.modalities), np.int64) for _ in range(2))
    for _, number, document, start, slots in pieces(step):
        source = run.stream.sources[number]
        modality = vocabulary.modality_of(source.read(document)[start : start + slots + 1])
        counted = is_target(source.masked(document), start, slots)
        tokens += np.bincount(modality[:-1], minlength=len(tokens))
        targets += np.bincount(modality[1:][counted], minlength=len(targets))
    weights = run.config.modality_weights or (1.0,) * len(tokens)
    columns = (vocabulary.modalities, tokens.tolist(), targets.tolist(), weights)
    return [ModalityCounts(*row) for row in zip(*columns, strict=True)]


def _sequences(
    run: RunData, step: ConsumedStep, count: int, tokenizers: Mapping[str, Tokenizer]
) -> list[ShownSequence]:
    shown: list[list[ShownDocument]] = [[] for _ in range(min(count, len(step.plan)))]
    filled = [0] * len(shown)
    for sequence, number, document, start, slots in pieces(step):
        if sequence < len(shown):
            source = run.stream.sources[number]
            shown[sequence].append(_document(source, document, start, slots, tokenizers))
            filled[sequence] += slots
    return [ShownSequence(step.first_sequence + i, filled[i], documents) for i, documents in enumerate(shown)]


def _document(
    source: TokenSource, document: int, start: int, slots: int, tokenizers: Mapping[str, Tokenizer]
) -> ShownDocument:
    """Show a piece of a document: the ids that it reads, and <eos> where it is the last piece."""
    (ids, vectors), masked = source.document(document), source.masked(document)
    end = start + slots + (start + slots + 1 == len(ids))
    counted = is_target(masked, 0, len(ids) - 1)
    counted = np.concatenate([counted[:1], counted])  # <bos>, which nothing predicts, is shown with the next
    borders = [i for i in range(start + 1, end) if counted[i] != counted[i - 1]]
    vocabulary, stretches = source.vocabulary, list[ShownStretch]()
    for a, b in pairwise([start, *borders, end]):
        pieces = _decoded(Document(ids[a:b], within(vectors, ids, a, b, vocabulary)), vocabulary, tokenizers)
        stretches.append(ShownStretch(bool(counted[a]), pieces))
    targets = int(is_target(masked, start, slots).sum())
    whole = slots == len(ids) - 1
    place = f"{slots} tokens" if whole else f"tokens {start} ... {start + slots - 1} of {len(ids) - 1}"
    return ShownDocument(str(source.folder), source.name(document), f"{place}, {targets} targets", stretches)


def _decoded(stretch: Document, vocabulary: Vocabulary, tokenizers: Mapping[str, Tokenizer]) -> list[Piece]:
    """Decode ids; the ids themselves stand where a border of targets cuts a picture or an utterance."""
    try:
        return decode(stretch, vocabulary, tokenizers)
    except SpanError:
        return [Piece("ids", text=f"[ids {' '.join(map(str, stretch.ids.tolist()))}]")]
