"""Prompts as ids: parts that a person gives, or the beginnings of held-out documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.spans import read_spans
from data_pipeline.shards.vectors import joined, within
from data_pipeline.shards.vocabulary import TEXT, Vocabulary
from data_pipeline.stream.order import documents_at
from data_pipeline.tokenize.documents import DocumentEncoder
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.raw import Part, SampleError, document_sample
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.evaluation.documents import ORDER_KEY, pairs
from pretrain.generation.grammar import FREE

SUFFIXES = {"image": "png", "speech": "wav"}
"""Modality -> ending of its files in a raw sample; the content of a file tells its format."""


@dataclass(frozen=True)
class Prompt:
    """The beginning of a document, <bos> first."""

    document: Document
    name: str
    truth: Document | None = None
    """What follows in the held-out document, as long as a sample of the goal."""

    @property
    def ids(self) -> Int[np.ndarray, " tokens"]:
        """Ids of the beginning; vectors stand beside them in `document`."""
        return self.document.ids


def prompt_of(parts: Sequence[tuple[str, str]], tokenizers: Mapping[str, Tokenizer]) -> Prompt:
    """The prompt of parts (modality, text or path of a file) in their order. Raises ConfigError."""
    encoder = DocumentEncoder(tokenizers, Limits.model_validate({}))
    vocabulary = encoder.vocabulary
    ids = [np.array([vocabulary.bos])]
    vectors: list[Mapping[str, np.ndarray]] = [joined([], vocabulary)]
    for modality, value in parts:
        flag = "--prompt" if modality == TEXT else f"--{modality} {value}"
        if modality not in tokenizers:
            raise ConfigError(f"{flag}: the model knows no {modality}, only {', '.join(tokenizers)}")
        if not value:  # the beginning of a document
            continue
        try:
            data = tokenizers[TEXT].read(value) if modality == TEXT else _content(Path(value), flag)
            encoded = encoder.encode(document_sample([Part(modality, data)], SUFFIXES))
        except SampleError as error:
            raise ConfigError(f"{flag}: {error}") from None
        ids.append(encoded.ids[1:-1])
        vectors.append(encoded.vectors)
    return Prompt(Document(np.concatenate(ids).astype(np.int64), joined(vectors, vocabulary)), "prompt")


def _content(path: Path, flag: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{flag}: cannot be read: {error.strerror}") from None


def heldout_prompts(source: TokenSource, count: int, goal: str, most_tokens: int) -> list[Prompt]:
    """The prompts of `first_prompts`. Raises ConfigError if there are fewer than `count`."""
    prompts = first_prompts(source, count, goal, most_tokens)
    if len(prompts) < count:
        raise ConfigError(
            f"--heldout {count}: {source.folder} has {len(prompts)} documents in which {_wanted(goal)} "
            f"follows another part within {most_tokens} tokens; ask for no more, or for another --to"
        )
    return prompts


def first_prompts(source: TokenSource, count: int, goal: str, most_tokens: int) -> list[Prompt]:
    """The beginnings of the first `count` held-out documents that can be cut for the goal, with at most
    `most_tokens` ids; fewer if there are no more. Their order is that of evaluations."""
    prompts: list[Prompt] = []
    for document in documents_at(0, source.num_documents, source.num_documents, ORDER_KEY).tolist():
        if len(prompts) == count:
            return prompts
        whole = source.document(document)
        found = cut_at(whole.ids, source.vocabulary, goal)
        if found is not None and found[0] <= most_tokens:
            start, end = found
            beginning, truth = (_within(whole, *cut, source.vocabulary) for cut in ((0, start), (start, end)))
            prompts.append(Prompt(beginning, source.name(document), truth))
    return prompts


def part_prompts(source: TokenSource, count: int, context_tokens: int) -> dict[tuple[str, str], list[Prompt]]:
    """By direction (a, b), a part a alone as prompt, with a part b of its document as truth, of the first
    `count` documents that hold both. They are those of conditional losses (evaluation/documents.py)."""
    found = pairs(source, num_documents=max(count, 2), context_tokens=context_tokens)
    bos = [source.vocabulary.bos]
    return {
        direction: [
            Prompt(
                Document(np.concatenate([bos, condition.ids]).astype(np.int64), condition.vectors),
                pair.name,
                Document(*pair.target),
            )
            for pair in listed[:count]
            for condition in [pair.condition]
        ]
        for direction, listed in found.items()
    }


def _within(document: Document, start: int, end: int, vocabulary: Vocabulary) -> Document:
    """Ids start ... end - 1 of a document with their vectors."""
    vectors = within(document.vectors, document.ids, start, end, vocabulary)
    return Document(document.ids[start:end].astype(np.int64), vectors)


def cut_at(ids: Int[np.ndarray, " tokens"], vocabulary: Vocabulary, goal: str) -> tuple[int, int] | None:
    """(end of the prompt, end of what a sample stands beside) in a document; None if it cannot be cut.

    The sample replaces the first part of the goal's modality that follows another part, or for "free" all
    from the second part on. A document of text alone is cut in its middle.
    """
    spans = read_spans(ids, vocabulary)
    if len(spans) == 1 and spans[0].modality == TEXT and goal in (FREE, TEXT):
        start, end = spans[0].start, spans[0].end
        return (start + end) // 2, len(ids) if goal == FREE else end
    for span in spans[1:]:
        if goal in (FREE, span.modality):
            return span.start, len(ids) if goal == FREE else span.end
    return None


def _wanted(goal: str) -> str:
    return "a part" if goal == FREE else f"a part of {goal}"
