import numpy as np
import pytest
import torch

from data_pipeline.shards.index import Document
from pretrain.generation.decoding import read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.models.routing_state import RoutingState
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.generation.test_decoding import texts
from tests.pretrain.models.random_batch import MOT, tiny_config
from tests.pretrain.tiny_data import VOCABULARY

MODEL = tiny_config(MOT, context_tokens=128, vocab_tokens=VOCABULARY.size)


def test_a_prompt_is_read_once_for_all_of_its_samples() -> None:
    """A selected cache continues as one that has read the prompts as often."""
    decoder, prompts, state = (
        perturbed(MODEL).double(),
        [Document(ids) for ids in texts()[:2]],
        RoutingState(),
    )
    once, twice = KeyCache.empty(2), KeyCache.empty(4)
    read_tokens(decoder, once, range(2), prompts, VOCABULARY, state)
    read_tokens(decoder, twice, range(4), [prompts[i] for i in (0, 0, 1, 1)], VOCABULARY, state)
    selected = once.select([0, 0, 1, 1])
    assert selected.held_bytes == twice.held_bytes == 2 * once.held_bytes
    ids = [Document(np.array([number])) for number in (9, 10, 11, 12)]
    found, _ = read_tokens(decoder, selected, range(4), ids, VOCABULARY, state)
    expected, _ = read_tokens(decoder, twice, range(4), ids, VOCABULARY, state)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_a_long_text_outgrows_the_room_of_its_cache() -> None:
    """Behind 70 tokens the cache has grown, and still tells what one pass tells."""
    decoder, state = perturbed(MODEL).double(), RoutingState()
    text = np.random.default_rng(1).integers(7, 24, 70)
    cache = KeyCache.empty(1)
    for token in text:
        logits, _ = read_tokens(decoder, cache, [0], [Document(np.array([token]))], VOCABULARY, state)
    expected, _ = read_tokens(decoder, KeyCache.empty(1), [0], [Document(text)], VOCABULARY, state)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    room = next(iter(cache.layers.values())).keys.shape[1]
    assert room == 128 and cache.lengths.tolist() == [70]


def test_prompts_of_different_lengths_behind_texts_are_refused() -> None:
    decoder, cache = perturbed(MODEL), KeyCache.empty(2)
    prompts = [Document(ids) for ids in texts()[:2]]
    read_tokens(decoder, cache, [0, 1], prompts, VOCABULARY, RoutingState())
    with pytest.raises(AssertionError, match="tokens behind"):
        read_tokens(decoder, cache, [0, 1], prompts, VOCABULARY, RoutingState())
