"""`motley evaluate --choices`: which of several options a model finds likeliest behind a prompt.

A line of the file is a question. A part is a table with one key, its modality; files are relative to the
folder of the questions. An option is a text, or a list of parts.

    {"prompt": [{"image": "7.png"}, {"text": " It shows"}], "options": [" a 3.", " a 7."], "answer": 1}
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.json_text import parse_json
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.tokenizer import Tokenizer
from parallel.world import World
from pretrain.generation.continuation import Ids
from pretrain.generation.likelihood import continuations
from pretrain.generation.prompts import prompt_of
from pretrain.generation.trained_model import TrainedModel, open_model


@dataclass(frozen=True)
class Question:
    """A line of the file, as ids."""

    prompt: Document
    """<bos> first."""
    options: tuple[Ids, ...]
    answer: int


@dataclass(frozen=True)
class Answer:
    """What a model says to a question."""

    log_likelihoods: tuple[float, ...]
    """Of each option, in nats, summed over its ids."""
    tokens: tuple[int, ...]
    answer: int

    @property
    def per_token(self) -> tuple[float, ...]:
        """Log-likelihoods per id, so that long options are not unlikely for their length alone."""
        return tuple(nats / count for nats, count in zip(self.log_likelihoods, self.tokens, strict=True))


def evaluate_choices(
    path: Path,
    questions: Path,
    out: Path | None,
    tokenizers: Path | None = None,
    world: World | None = None,
) -> None:
    """Print the accuracy of a run or weights on a file of questions, and write an answer per line to `out`.

    `world`: the ranks that share the model, which all call it; rank 0 prints and writes. Raises ConfigError,
    and then writes nothing.
    """
    model = open_model(path, tokenizers, world)
    answers = [answer(model, question) for question in read_questions(questions, model)]
    if not model.writes:
        return
    if out is not None:
        lines = [
            json.dumps(
                {"log_likelihoods": a.log_likelihoods, "tokens": a.tokens, "answer": a.answer,
                 "chosen": int(np.argmax(a.per_token))}
            )
            for a in answers
        ]  # fmt: skip
        with atomic_file(out) as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
    right = [np.mean([np.argmax(a.per_token) == a.answer for a in answers])]
    right.append(np.mean([np.argmax(a.log_likelihoods) == a.answer for a in answers]))
    chance = np.mean([1 / len(a.tokens) for a in answers])
    error = np.sqrt(right[0] * (1 - right[0]) / len(answers))
    print(
        f"{questions}: {len(answers)} questions, accuracy {right[0]:.3f} (standard error {error:.3f}; chance "
        f"{chance:.3f}) by log-likelihood per token, {right[1]:.3f} by its sum"
    )


def answer(model: TrainedModel, question: Question) -> Answer:
    """The log-likelihoods of the options behind the prompt."""
    found = continuations(model, [(question.prompt, option) for option in question.options])
    nats = tuple(option.log_likelihood for option in found)
    return Answer(nats, tuple(map(len, question.options)), question.answer)


def read_questions(path: Path, model: TrainedModel) -> Iterator[Question]:
    """The questions of a file. Raises ConfigError, which names file and line."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"--choices {path}: cannot be read: {error.strerror}") from None
    if not lines:
        raise ConfigError(f"--choices {path}: holds no question; a line is one")
    context = model.decoder.config.context_tokens
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        question = _question(line, where, path.parent, model.tokenizers)
        longest = len(question.prompt.ids) + max(map(len, question.options))
        if longest > context + 1:
            raise ConfigError(f"{where}: {longest} tokens, but the context has {context}; shorten it")
        yield question


def _question(line: bytes, where: str, folder: Path, tokenizers: Mapping[str, Tokenizer]) -> Question:
    try:
        value = parse_json(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(value, dict) or not {"prompt", "options", "answer"} <= value.keys():
        raise ConfigError(f'{where}: needs "prompt" (a list of parts), "options" and "answer" (its number)')
    options, right = value["options"], value["answer"]
    if not isinstance(options, list) or len(options) < 2:
        raise ConfigError(f'{where}: "options" is a list of two or more texts or lists of parts')
    if type(right) is not int or not 0 <= right < len(options):
        raise ConfigError(f'{where}: "answer" is {right!r:.40}; legal: 0 to {len(options) - 1}')

    def encode(value: Any, field: str) -> Document:
        try:
            return prompt_of(_parts(value, folder), tokenizers).document
        except ConfigError as error:
            raise ConfigError(f"{where}: {field}: {error}") from None

    encoded = [encode(option, f"option {i}") for i, option in enumerate(options)]
    if not all(len(option.ids) > 1 for option in encoded):
        raise ConfigError(f"{where}: an option is empty")
    for modality in encoded[0].vectors:
        if any(len(option.vectors[modality]) for option in encoded):
            raise ConfigError(
                f"{where}: an option holds {modality}, which is vectors to this model and has no likelihood; "
                "put it into the prompt"
            )
    ids = tuple(option.ids[1:] for option in encoded)
    return Question(encode(value["prompt"], "prompt"), ids, right)


def _parts(value: Any, folder: Path) -> Sequence[tuple[str, str]]:
    """(modality, text or path) of a text or a list of parts. Raises ConfigError."""
    found = []
    for part in [{TEXT: value}] if isinstance(value, str) else value if isinstance(value, list) else [value]:
        if not isinstance(part, dict) or len(part) != 1 or not isinstance(next(iter(part.values())), str):
            raise ConfigError(f"a part is {{modality: text or name of a file}}; got {part!r:.80}")
        ((modality, content),) = part.items()
        found.append((modality, content if modality == TEXT else str(folder / content)))
    return found
