"""The ledger of decoding: FLOPs of a prompt that is read in one pass, and of a token behind it, and the bytes
of the cache. FLOPs as in accounting.py. Imports no torch.

Tokens that depth routers let skip are counted as expected after warm-up, and experts as on average.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

from pretrain.models.accounting import (
    aligned,
    flops_per_token,
    kv_numbers_per_token,
    visible_pairs,
)
from pretrain.models.config import ModelConfig

BYTES = 2
"""Bytes of a number in the cache of a model in bf16."""


def prefill_flops(config: ModelConfig, tokens: Mapping[str, int], pairs: int, *, prompts: int = 1) -> int:
    """FLOPs of one pass over prompts of `tokens` (modality -> count), whose masks show `pairs` pairs in all.
    The head works on the last token of each prompt alone."""
    total, power = sum(tokens.values()), 2 if config.depth_block.keys == "selected" else 1
    # Layers' worth of pairs: those of queries that run, with "selected" keys those of keys that run, too.
    seen = sum(
        layers
        * (sum(count * ratio for count, ratio in zip(tokens.values(), ratios, strict=True)) / total) ** power
        for ratios, layers in _layers_alike(config, tokens).items()
    )
    linear = sum(count * sum(flops_per_token(config, m).values()) for m, count in tokens.items())
    return linear - _head_flops(config) * (total - prompts) + _pair_flops(config, pairs * seen)


def decoded_token_flops(config: ModelConfig, modality: str, earlier: Mapping[str, int]) -> int:
    """FLOPs of one token of the modality behind `earlier` tokens (modality -> count), head included."""
    selected = config.depth_block.keys == "selected"
    pairs = 0.0
    for (ratio, *shares), layers in _layers_alike(config, (modality, *earlier)).items():
        shown = shares if selected else [1.0] * len(shares)
        keys = sum(count * share for count, share in zip(earlier.values(), shown, strict=True))
        pairs += layers * ratio * (1 + keys)  # a token that runs sees itself
    return sum(flops_per_token(config, modality).values()) + _pair_flops(config, pairs)


def _layers_alike(config: ModelConfig, modalities: Iterable[str]) -> Counter[tuple[float, ...]]:
    """Number of layers by the shares of the modalities' tokens that attend in them."""
    return Counter(zip(*(_ratios(config, modality) for modality in modalities), strict=True))


def _ratios(config: ModelConfig, modality: str) -> list[float]:
    """Share of the modality's tokens that attend in each layer."""
    if modality not in config.depth or config.depth_block.parts == "feed_forward":
        return [1.0] * config.num_layers
    ratios = config.depth[modality].ratios(config.num_layers)
    return [1.0 if ratio is None else ratio for ratio in ratios]


def _pair_flops(config: ModelConfig, pairs: float) -> int:
    """FLOPs of (query, key) pairs, each counted in every layer in which it is computed."""
    return round(4 * pairs * config.num_heads * config.head_dim)


def _head_flops(config: ModelConfig) -> int:
    return 2 * config.vocab_tokens * config.d_model


def cache_bytes(config: ModelConfig, tokens: Mapping[str, int], number_bytes: int = BYTES) -> int:
    """Bytes of the keys and values of `tokens` (modality -> count), over all layers."""
    numbers = sum(kv_numbers_per_token(config, modality) * count for modality, count in tokens.items())
    return round(numbers * number_bytes)


def describe_decoding(config: ModelConfig, prompt_tokens: int | None = None) -> str:
    """Table for a person: a prompt of `prompt_tokens` tokens (None: the context) of each modality alone."""
    length = prompt_tokens or config.context_tokens
    prompts = [{modality: length} for modality in config.towers]
    rows = [
        [f"behind a prompt of {length:,} tokens", *config.towers],
        ["prefill FLOPs", *(f"{prefill_flops(config, p, visible_pairs([length])):,}" for p in prompts)],
        ["decoded token FLOPs", *(f"{decoded_token_flops(config, m, {m: length}):,}" for m in config.towers)],
        ["cache bytes", *(f"{cache_bytes(config, p):,}" for p in prompts)],
    ]
    return "\n".join(aligned(rows))
