"""An adapter for lm-evaluation-harness and harnesses like it: their requests about text, answered by a model.

Its methods are those of the harness's class `LM` (lm-eval 0.4.13, lm_eval/api/model.py), which a user's class
inherits beside it; docs/generate.md shows how. This module does not import the harness.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.index import Document
from data_pipeline.shards.vocabulary import TEXT
from data_pipeline.tokenize.raw import SampleError
from pretrain.generation.continuation import Ids, continue_prompts
from pretrain.generation.likelihood import continuations
from pretrain.generation.sampling import Sampling
from pretrain.generation.trained_model import open_model

_MAX_TOKENS = 256
"""Ids of a generated answer where a request says nothing, as in the harness."""


class Request(Protocol):
    """A question of a harness; an `Instance` of lm-eval is one."""

    @property
    def args(self) -> tuple[Any, ...]: ...


class HarnessModel:
    """A trained model that answers requests about text. A text begins a document; of one that is longer than
    the context the end counts."""

    def __init__(self, path: str | Path, tokenizers: str | Path | None = None, seed: int = 1) -> None:
        """`path`, `tokenizers`: as of `motley generate`. Raises ConfigError."""
        super().__init__()  # the harness's own class, where it stands beside this one
        self._trained = open_model(Path(path), None if tokenizers is None else Path(tokenizers))
        self._seed = seed

    @property
    def _context_tokens(self) -> int:
        return self._trained.decoder.config.context_tokens

    def loglikelihood(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation in nats, and whether all of its ids are the
        likeliest. A request is (context, continuation)."""
        pairs = []
        for request in requests:
            prompt, continuation = self._pair(*request.args)
            room = self._context_tokens + 1 - len(continuation)
            if room < 1:
                raise ConfigError(
                    f"a continuation of {len(continuation)} tokens is longer than the context of "
                    f"{self._context_tokens}: {request.args[1]!r:.60}"
                )
            pairs.append((Document(_ending(prompt, room)), continuation))
        return [
            (float(found.log_likelihood), found.is_greedy) for found in continuations(self._trained, pairs)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> list[float]:
        """Return the log-likelihood of each whole text, in stretches as long as the context.

        A request is (text,). A stretch is judged behind one token before it, the last behind as many as fit,
        as the harness asks.
        """
        pairs: list[tuple[Document, Ids]] = []
        counts = []
        for request in requests:
            ids = self._begun(request.args[0])
            starts, context = range(1, len(ids), self._context_tokens), self._context_tokens
            for start in starts:
                end = min(start + context, len(ids))
                before = Document(ids[max(0, end - 1 - context) : start])
                pairs.append((before, ids[start:end]))
            counts.append(len(starts))
        nats = iter([found.log_likelihood for found in continuations(self._trained, pairs)])
        return [sum(next(nats) for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Return the text behind each context, up to the first text of `until`.

        A request is (context, settings). Settings are those of the harness: until, max_gen_toks, do_sample,
        temperature, top_k and top_p. Without do_sample, or at temperature 0, the likeliest ids are written.
        Raises ConfigError for others.
        """
        answers: list[str] = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            alike.setdefault(repr(sorted(request.args[1].items())), []).append(number)
        for numbers in alike.values():
            contexts = [requests[number].args[0] for number in numbers]
            texts = self._generated(contexts, requests[numbers[0]].args[1])
            for number, text in zip(numbers, texts, strict=True):
                answers[number] = text
        return answers

    def _generated(self, contexts: Sequence[str], settings: Mapping[str, Any]) -> list[str]:
        stops, max_tokens, sampling = self._settings(settings)
        tokenizer, model = self._trained.tokenizers[TEXT], self._trained

        def is_over(ids: Sequence[int]) -> bool:
            return any(stop in tokenizer.decode(np.array(ids)) for stop in stops)

        room = self._context_tokens + 1 - max_tokens
        found = continue_prompts(
            model.decoder,
            [Document(_ending(self._begun(context), room)) for context in contexts],
            model.grammar(TEXT),
            sampling,
            model.routing_state,
            samples=1,
            max_tokens=max_tokens,
            is_over=is_over,
        )
        texts = [tokenizer.decode(of.ids[of.ids != model.vocabulary.eos]) for (of,) in found]
        return [text[: min(_first_ends(text, stops))] for text in texts]

    def _settings(self, settings: Mapping[str, Any]) -> tuple[list[str], int, Sampling]:
        """(texts that end an answer, most ids of one, how ids are drawn). Raises ConfigError."""
        rest = dict(settings)
        until = rest.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        most = self._context_tokens // 2
        max_tokens = rest.pop("max_gen_toks", None) or min(_MAX_TOKENS, most)
        if not 1 <= max_tokens <= self._context_tokens:
            raise ConfigError(
                f"max_gen_toks = {max_tokens}: the context of {self._context_tokens} tokens also holds the "
                f"prompt; legal: 1 to {self._context_tokens}, such as {most}"
            )
        sampled = rest.pop("do_sample", False)
        temperature = float(rest.pop("temperature", 1.0 if sampled else 0.0)) if sampled else 0.0
        rest.pop("temperature", None)
        how = Sampling(temperature, rest.pop("top_k", None), float(rest.pop("top_p", 1.0)), self._seed)
        if rest:
            raise ConfigError(
                f"generate_until: unknown settings {', '.join(map(str, rest))}; legal: until, max_gen_toks, "
                "do_sample, temperature, top_k, top_p"
            )
        return stops, max_tokens, how

    def _pair(self, context: str, continuation: str) -> tuple[Ids, Ids]:
        """Ids of a context, <bos> first, and of a continuation. They are those of the joined text where the
        context's ids begin it, so a continuation is judged as it stands in a text; spaces that end the
        context count to the continuation, which the pieces of the tokenizer begin with."""
        kept = context.rstrip()
        spaces = context[len(kept) :]
        first, whole = self._encode(kept), self._encode(kept + spaces + continuation)
        rest = whole[len(first) :]
        if len(rest) == 0 or not np.array_equal(whole[: len(first)], first):
            rest = self._encode(spaces + continuation)
        if len(rest) == 0:
            raise ConfigError(f"the continuation of {context!r:.60} is empty")
        return np.append(self._trained.vocabulary.bos, first), rest

    def _begun(self, text: str) -> Ids:
        """Ids of a text behind <bos>."""
        return np.append(self._trained.vocabulary.bos, self._encode(text))

    def _encode(self, text: str) -> Ids:
        tokenizer = self._trained.tokenizers[TEXT]
        try:
            return tokenizer.encode(tokenizer.read(text)).astype(np.int64)
        except SampleError as error:
            raise ConfigError(f"{text!r:.60}: {error}") from None


def _ending(ids: Ids, room: int) -> Ids:
    """At most `room` ids: <bos> and the last of the others."""
    return ids if len(ids) <= room else np.append(ids[:1], ids[len(ids) - room + 1 :])


def _first_ends(text: str, stops: Iterable[str]) -> list[int]:
    """The length of the text, and where each stop begins that it holds."""
    return [len(text), *(text.index(stop) for stop in stops if stop in text)]
