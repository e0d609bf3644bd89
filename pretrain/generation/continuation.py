"""Continuing prompts: token by token, every id drawn from the model inside the grammar, and image by image
where images are vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from data_pipeline.shards.index import Document
from pretrain.generation.decoding import read_tokens
from pretrain.generation.denoise import Denoising
from pretrain.generation.grammar import Grammar, Place
from pretrain.generation.images import denoising_of, write_images
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.sampling import Sampling, draw, probabilities, uniforms
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState

Ids = Int[np.ndarray, " tokens"]


def continue_prompts(
    decoder: Decoder,
    prompts: Sequence[Document],
    grammar: Grammar,
    sampling: Sampling,
    routing_state: RoutingState,
    *,
    samples: int,
    max_tokens: int | None = None,
    sequences_at_once: int = 64,
    prompt_state: RoutingState | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[Document]]:
    """`samples` continuations of every prompt, without the ids and vectors of the prompt.

    A continuation has at most `max_tokens` ids (None: as many as the context holds; grammar.least_room()
    must fit) and is drawn by its own random numbers, so it does not depend on how many are drawn.
    `sequences_at_once`: that are decoded side by side; it bounds the memory of the cache. `prompt_state`: by
    what routers choose tokens of prompts; None: as those that are written. `is_over`: says of the ids of a
    sample whether nothing more is to follow; None: the grammar alone does. Raises ConfigError for sampling
    that does not go with the objective of images.
    """
    rooms = [room_behind(len(prompt.ids), decoder.config.context_tokens, max_tokens) for prompt in prompts]
    assert min(rooms) >= grammar.least_room(), "a prompt leaves no room for a sample"
    how = denoising_of(decoder.config, grammar.vocabulary, sampling)
    work = _Work(decoder, grammar, sampling, how, routing_state, is_over or _never)
    numbers = [divmod(number, samples) for number in range(len(prompts) * samples)]
    found: list[Document] = []
    for first in range(0, len(numbers), sequences_at_once):
        group = numbers[first : first + sequences_at_once]
        cache, logits = _behind(work, prompts, [p for p, _ in group], prompt_state or routing_state)
        begun = [_Sample(uniforms(sampling.seed, *number), rooms[number[0]]) for number in group]
        _write(work, cache, begun, logits)
        found += [sample.document for sample in begun]
    return [found[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def room_behind(prompt_tokens: int, context_tokens: int, max_tokens: int | None = None) -> int:
    """Ids that fit behind a prompt. A document is one id longer than the context: its last is not read."""
    room = context_tokens + 1 - prompt_tokens
    return room if max_tokens is None else min(room, max_tokens)


def _never(_: Sequence[int]) -> bool:
    return False


@dataclass(frozen=True)
class _Work:
    """What the samples of a call share."""

    decoder: Decoder
    grammar: Grammar
    sampling: Sampling
    how: Mapping[str, Denoising]
    """Modality of vectors -> how its images are made."""
    routing_state: RoutingState
    is_over: Callable[[Sequence[int]], bool]

    def on_host(self, logits: Float[Tensor, "sequences ids"]) -> Float[np.ndarray, "sequences vocabulary"]:
        """Logits in float64, without ids that the vocabulary lacks."""
        return logits[:, : self.grammar.vocabulary.size].double().cpu().numpy()


@dataclass
class _Sample:
    """A sample as far as it is written."""

    random: np.random.Generator
    room: int
    """Ids that it may have."""
    ids: list[int] = field(default_factory=list)
    vectors: dict[str, list[np.ndarray]] = field(default_factory=dict)
    """Modality of vectors -> the vectors of its images."""
    place: Place = field(default_factory=Place)

    @property
    def document(self) -> Document:
        vectors = {modality: np.concatenate(images) for modality, images in self.vectors.items()}
        return Document(np.array(self.ids), vectors)


def _behind(
    work: _Work, prompts: Sequence[Document], chosen: Sequence[int], state: RoutingState
) -> tuple[KeyCache, Float[np.ndarray, "samples vocabulary"]]:
    """(cache, logits) behind the chosen prompts, of which each is read once however often it is chosen."""
    own = sorted(set(chosen))
    cache, texts = KeyCache.empty(len(own)), [prompts[number] for number in own]
    logits, _ = read_tokens(work.decoder, cache, range(len(own)), texts, work.grammar.vocabulary, state)
    rows = [own.index(number) for number in chosen]
    return cache.select(rows), work.on_host(logits[rows])


def _write(
    work: _Work,
    cache: KeyCache,
    samples: Sequence[_Sample],
    logits: Float[np.ndarray, "samples vocabulary"],
) -> None:
    """Write the samples, which stand behind the sequences of the cache, to their ends."""
    active = list(range(len(samples)))
    while True:
        for row, i in enumerate(active):
            sample = samples[i]
            allowed = work.grammar.allowed(sample.place, sample.room - len(sample.ids))
            token = draw(probabilities(logits[row], allowed, work.sampling), sample.random.random())
            sample.ids.append(token)
            sample.place = work.grammar.after(sample.place, token)
        active = [i for i in active if not samples[i].place.ended and len(samples[i].ids) < samples[i].room]
        active = [i for i in active if not work.is_over(samples[i].ids)]
        if not active:
            return
        logits = _read(work, cache, samples, active)


def _read(
    work: _Work, cache: KeyCache, samples: Sequence[_Sample], active: Sequence[int]
) -> Float[np.ndarray, "active vocabulary"]:
    """Let active samples read their last ids; where such an id opens an image of vectors, the image is made
    and read, too. Returns the logits behind them; 0 behind an image, where the grammar knows what follows."""
    vocabulary = work.grammar.vocabulary
    logits = np.zeros((len(active), vocabulary.size))
    opened = {i: m for i in active for m in work.how if samples[i].place == Place(m)}
    rows = [row for row, i in enumerate(active) if i not in opened]
    if rows:
        chosen = [active[row] for row in rows]
        last = [Document(np.array(samples[i].ids[-1:]), {}) for i in chosen]
        found, _ = read_tokens(work.decoder, cache, chosen, last, vocabulary, work.routing_state)
        logits[rows] = work.on_host(found)
    for modality, how in work.how.items():
        chosen = [i for i, m in opened.items() if m == modality]
        if not chosen:
            continue
        count = work.grammar.span_codes[modality]
        images = write_images(
            work.decoder, cache, chosen, modality, count, how, [samples[i].random for i in chosen],
            vocabulary, work.routing_state,
        )  # fmt: skip
        for i, image in zip(chosen, images, strict=True):
            samples[i].ids += [vocabulary.first_code(modality)] * count
            samples[i].vectors.setdefault(modality, []).append(image)
            samples[i].place = Place(modality, count)
    return logits
