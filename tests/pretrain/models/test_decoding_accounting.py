import numpy as np
import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.shards.index import Document
from pretrain.generation.decoding import read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.models.accounting import forward_flops, visible_pairs
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.decoding_accounting import (
    cache_bytes,
    decoded_token_flops,
    describe_decoding,
    prefill_flops,
)
from pretrain.models.routing_state import RoutingState
from tests.pretrain.models.random_batch import DENSE, MOT, depth_tables, tiny_config
from tests.pretrain.tiny_data import VOCABULARY

CONFIGS = {
    "dense": (DENSE, {"norm_placement": "pre"}),
    "mot": (MOT, {}),
    "one_key": (MOT, {"num_kv_heads": 1, "qk_norm": False}),
    "wide_heads": (MOT, {"head_size": 6, "num_kv_heads": None}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_and_bytes_equal_those_measured(name: str) -> None:
    """Of two prompts of 6 tokens and of a token behind each. Attention runs as plain products, the one form
    that torch's counter knows on a CPU: in the prompt it has every pair."""
    towers, changes = CONFIGS[name]
    config = tiny_config(towers, vocab_tokens=VOCABULARY.size, **changes)
    decoder, cache, state = Decoder(config), KeyCache.empty(2), RoutingState()
    ids = [Document(np.array([1, 8, 9, 24, 25, 40])), Document(np.array([1, 24, 25, 26, 27, 41]))]
    tokens = {"text": 4, "image": 6, "speech": 2}
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as prefill:
        read_tokens(decoder, cache, [0, 1], ids, VOCABULARY, state)
    assert prefill.get_total_flops() == prefill_flops(config, tokens, 2 * 6 * 6, prompts=2)
    assert cache.held_bytes == cache_bytes(config, tokens, number_bytes=4)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as decoding:
        read_tokens(decoder, cache, [0, 1], [Document(np.array([28]))] * 2, VOCABULARY, state)
    assert decoding.get_total_flops() == 2 * decoded_token_flops(config, "image", {"text": 4, "image": 2})


def pmod(**changes: object) -> ModelConfig:
    """LLaVA-1.5-7B with p-MoD's schedule of image tokens: 32 layers, 24 of them with a router."""
    table = {"schedule": "cosine", "mean_ratio": 0.5375, "rule": "threshold", "keys": "selected"}
    shape = {
        "num_layers": 32, "d_model": 4096, "num_heads": 32, "ffn_hidden": 11_008, "context_tokens": 2048,
        "vocab_tokens": 32_000, "towers": {"text": "all", "image": "all"},
    }  # fmt: skip
    return ModelConfig.model_validate({**shape, **depth_tables(["image"], **table), **changes})


def test_the_cache_of_pmods_image_tokens_is_as_published() -> None:
    """53.8 % (arXiv 2412.04449, table 1), of image tokens alone; with all keys nothing is saved."""
    dense = pmod(depth={}, depth_block={})
    image, text = {"image": 576}, {"text": 576}
    assert cache_bytes(pmod(), image) / cache_bytes(dense, image) == pytest.approx(0.538, abs=6e-4)
    assert cache_bytes(pmod(), text) == cache_bytes(dense, text) == 576 * 32 * 2 * 4096 * 2
    assert cache_bytes(pmod(depth_block={"keys": "all"}), image) == cache_bytes(dense, image)


def test_flops_of_routed_tokens_follow_the_ratios_of_their_layers() -> None:
    """By hand, for one block with a router of ratio 1/2."""
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold", "keys": "selected"}
    config = tiny_config(MOT, num_layers=1, **depth_tables(["image"], **table))
    dense = tiny_config(MOT, num_layers=1)
    head, pair = 2 * 40 * 16, 4 * 4 * 4
    block = decoded_token_flops(dense, "image", {}) - head - pair
    # Half of the tokens run; of 10 image and 4 text keys 5 and 4 are there, and the token itself.
    expected = head + 0.5 * (block + (5 + 4 + 1) * pair)
    assert decoded_token_flops(config, "image", {"image": 10, "text": 4}) == expected
    assert decoded_token_flops(config, "text", {"image": 10, "text": 4}) == head + block + 10 * pair


@pytest.mark.parametrize("keys", ["all", "selected"])
def test_a_prompt_costs_a_forward_pass_without_the_other_heads(keys: str) -> None:
    config, tokens = pmod(depth_block={"keys": keys}), {"text": 60, "image": 576}
    pairs = visible_pairs([636])
    expected = forward_flops(config, tokens, pairs) - 635 * 2 * 32_000 * 4096
    # FLOPs of a token that may skip are rounded to whole numbers, token by token: 1e-10 of the sum.
    assert prefill_flops(config, tokens, pairs) == pytest.approx(expected, rel=1e-9)


def test_the_table_says_what_the_functions_say() -> None:
    config = tiny_config(MOT)
    lines = [line.split() for line in describe_decoding(config, 8).splitlines()]
    assert lines[0][-3:] == ["text", "image", "speech"]
    flops = prefill_flops(config, {"image": 8}, visible_pairs([8]))
    assert lines[1] == ["prefill", "FLOPs", *[f"{flops:,}"] * 3]
    assert lines[2][3] == f"{decoded_token_flops(config, 'image', {'image': 8}):,}"
    assert lines[3] == ["cache", "bytes", *[f"{8 * 2 * 2 * 2 * 4 * 2:,}"] * 3]
    assert describe_decoding(config).startswith("behind a prompt of 12 tokens")
