"""Continuing prompts: token by token, every id drawn from the model inside the grammar."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int

from pretrain.generation.decoding import read_tokens
from pretrain.generation.grammar import Grammar, Place
from pretrain.generation.key_cache import KeyCache
from pretrain.generation.sampling import Sampling, draw, probabilities, uniforms
from pretrain.models.decoder import Decoder
from pretrain.models.routing_state import RoutingState

Ids = Int[np.ndarray, " tokens"]


def continue_prompts(
    decoder: Decoder,
    prompts: Sequence[Ids],
    grammar: Grammar,
    sampling: Sampling,
    routing_state: RoutingState,
    *,
    samples: int,
    max_tokens: int | None = None,
    sequences_at_once: int = 64,
    prompt_state: RoutingState | None = None,
    is_over: Callable[[Sequence[int]], bool] | None = None,
) -> list[list[Ids]]:
    """`samples` continuations of every prompt, without the ids of the prompt.

    A continuation has at most `max_tokens` ids (None: as many as the context holds; grammar.least_room()
    must fit) and is drawn by its own random numbers, so it does not depend on how many are drawn.
    `sequences_at_once`: that are decoded side by side; it bounds the memory of the cache. `prompt_state`: by
    what routers choose tokens of prompts; None: as those that are written. `is_over`: says of the ids of a
    sample whether nothing more is to follow; None: the grammar alone does.
    """
    states = prompt_state or routing_state, routing_state
    is_over = is_over or _never
    rooms = [room_behind(len(prompt), decoder.config.context_tokens, max_tokens) for prompt in prompts]
    assert min(rooms) >= grammar.least_room(), "a prompt leaves no room for a sample"
    numbers = list(range(len(prompts) * samples))
    found: list[Ids] = []
    for first in range(0, len(numbers), sequences_at_once):
        group = numbers[first : first + sequences_at_once]
        found += _continue_group(decoder, prompts, rooms, group, samples, grammar, sampling, states, is_over)
    return [found[i * samples : (i + 1) * samples] for i in range(len(prompts))]


def room_behind(prompt_tokens: int, context_tokens: int, max_tokens: int | None = None) -> int:
    """Ids that fit behind a prompt. A document is one id longer than the context: its last is not read."""
    room = context_tokens + 1 - prompt_tokens
    return room if max_tokens is None else min(room, max_tokens)


def _never(_: Sequence[int]) -> bool:
    return False


def _continue_group(
    decoder: Decoder,
    prompts: Sequence[Ids],
    rooms: Sequence[int],
    group: Sequence[int],
    samples: int,
    grammar: Grammar,
    sampling: Sampling,
    states: tuple[RoutingState, RoutingState],
    is_over: Callable[[Sequence[int]], bool],
) -> list[Ids]:
    """Continuations of the numbers in `group`: number n is sample n % samples of prompt n // samples.
    `states`: for prompts, and for what is written."""
    of_prompts, of_written = states
    prompt_of = [number // samples for number in group]
    own = sorted(set(prompt_of))
    cache = KeyCache.empty(len(own))
    logits, _ = read_tokens(
        decoder, cache, range(len(own)), [prompts[p] for p in own], grammar.vocabulary, of_prompts
    )
    rows = [own.index(p) for p in prompt_of]
    cache, logits = cache.select(rows), logits[rows]
    random = [uniforms(sampling.seed, *divmod(number, samples)) for number in group]
    ids: list[list[int]] = [[] for _ in group]
    places, active = [Place()] * len(group), list(range(len(group)))
    while True:
        on_host = logits[:, : grammar.vocabulary.size].double().cpu().numpy()
        for row, i in enumerate(active):
            allowed = grammar.allowed(places[i], rooms[prompt_of[i]] - len(ids[i]))
            token = draw(probabilities(on_host[row], allowed, sampling), random[i].random())
            ids[i].append(token)
            places[i] = grammar.after(places[i], token)
        active = [i for i in active if not places[i].ended and len(ids[i]) < rooms[prompt_of[i]]]
        active = [i for i in active if not is_over(ids[i])]
        if not active:
            return [np.array(each) for each in ids]
        last = [np.array(ids[i][-1:]) for i in active]
        logits, _ = read_tokens(decoder, cache, active, last, grammar.vocabulary, of_written)
