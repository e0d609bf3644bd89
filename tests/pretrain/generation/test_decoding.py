"""Token by token on the cache, the decoder computes what one pass over the whole texts computes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.shards.index import Document
from pretrain.generation.decoding import pass_inputs, read_tokens
from pretrain.generation.key_cache import KeyCache
from pretrain.models.accounting import kv_numbers_per_token
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.router_report import RouterReport
from pretrain.models.routing_state import RoutingState
from tests.numerics.test_naive_depth import perturbed
from tests.pretrain.models.random_batch import (
    DENSE,
    ELEMENTS,
    IMAGE_SPEECH_SHARED,
    MOT,
    depth_tables,
    tiny_config,
)
from tests.pretrain.tiny_data import VOCABULARY, part

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Relative to the largest logit. Measured: 2.0e-15 in fp64, 9.9e-7 in fp32; the order of sums differs."""
PROMPTS = (18, 12, 20, 1)
"""Tokens of each text that are its prompt. The texts go on behind it, and end one after the other."""
_TOKEN_CHOICE = {"num_experts": 3, "routing": "token_choice", "top_k": 2}
_DEPTH = {"schedule": "constant", "mean_ratio": 0.5, "rule": "threshold"}
_ROUTED = ("text", "image")


def _depth(**keys: Any) -> dict[str, Any]:
    return depth_tables(_ROUTED, **{**_DEPTH, **keys})


MODELS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "dense": (DENSE, {"norm_placement": "pre"}),
    "dense_all_heads": (DENSE, {"num_kv_heads": None, "qk_norm": False}),
    "mot": (MOT, {}),
    "mot_pre_one_key": (MOT, {"norm_placement": "pre", "num_kv_heads": 1}),
    "two_towers_no_qk_norm": (IMAGE_SPEECH_SHARED, {"qk_norm": False, "head_size": 6}),
    "attention_tied": (MOT, {"untied": ["feed_forward", "norm"], "tied_embeddings": True}),
    "head_untied": (MOT, {"untied": ["qkv", "embedding", "head", "final_norm"]}),
    "wide": (MOT, {"mup_base_width": 8}),
    "elements": (MOT, ELEMENTS),
    "token_choice": (MOT, {"experts": {"image": _TOKEN_CHOICE}}),
    "expert_choice": (MOT, {"experts": {"text": {"num_experts": 4}, "image": {"num_experts": 2}}}),
    "depth": (MOT, _depth()),
    "depth_dense": (DENSE, _depth(scale="all", gate="sigmoid")),
    "depth_selected": (MOT, _depth(keys="selected")),
    "depth_as_released": (MOT, _depth(keys="selected", scale="all_as_released", rule="top_k")),
    "depth_feed_forward": (MOT, {**_depth(parts="feed_forward"), "norm_placement": "pre"}),
    "depth_experts": (MOT, {**_depth(), "experts": {"image": _TOKEN_CHOICE, "text": {"num_experts": 2}}}),
}
IN_FP32 = ("mot", "depth_selected", "depth_experts")
"""Models that are compared in fp32, too: what loses bits would do so in one of them."""
THRESHOLD, EXPERT_THRESHOLD = 0.01, -1.0
"""Least scores that let about half of the tokens through, in decoders of `perturbed`."""


def texts() -> list[np.ndarray]:
    """A document per prompt, of text, images and speech; the prompts end inside of an image, in front of
    speech, inside of speech and behind <bos>."""
    rng = np.random.default_rng(4)
    orders = (("text", "image", "text"), ("image", "speech"), ("text", "speech", "image"), ("image",))
    return [
        np.concatenate([[1], *(part(name, number, rng) for name in names), [2]])
        for number, names in enumerate(orders)
    ]


def routing_of(model: ModelConfig) -> RoutingState:
    """Thresholds of all routers."""
    layers = range(model.num_layers)
    depth = {f"blocks.{layer}.depth.{m}": THRESHOLD for layer in layers for m in _ROUTED}
    experts = {
        f"blocks.{layer}.experts.{tower}.{expert}": EXPERT_THRESHOLD
        for tower, of_tower in model.experts.items()
        for layer in layers
        for expert in range(of_tower.num_experts)
    }
    return RoutingState(causal=True, thresholds=depth | experts)


def ran_in(report: RouterReport, pieces: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each piece of a pass, which of its tokens ran: bool [tokens, layers with depth routers]."""
    of_layers = [block.ran[0][0] for block in report.layers.values() if block.ran]
    ends = np.cumsum([len(piece) for piece in pieces])
    ran = np.stack(of_layers, axis=1) if of_layers else np.zeros((ends[-1], 0), bool)
    return np.split(ran, ends[:-1])


@torch.no_grad()
def in_one_pass(decoder: Decoder, state: RoutingState) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Logits of every token of each text in one pass without a cache, and which tokens ran."""
    ids = texts()
    inputs = replace(
        pass_inputs(list(map(Document, ids)), [0] * len(ids), decoder.config, VOCABULARY, state),
        report_ran=True,
    )
    hidden, report = decoder.hidden(inputs)
    assert decoder.head is not None
    logits = decoder.head(hidden, inputs)
    assert isinstance(logits, torch.Tensor)
    return list(logits[inputs.routing.to_sequence].split([len(each) for each in ids])), ran_in(report, ids)


def token_by_token(
    decoder: Decoder, state: RoutingState, prompt_state: RoutingState | None = None
) -> tuple[list[dict[int, torch.Tensor]], list[np.ndarray], KeyCache]:
    """The same on a cache, prompts first; logits by the number of tokens before them. `prompt_state`: for
    prompts; None: as for all."""
    ids, at = texts(), list(PROMPTS)
    cache, active = KeyCache.empty(len(ids)), list(range(len(ids)))
    pieces = [each[:count] for each, count in zip(ids, PROMPTS, strict=True)]
    logits: list[dict[int, torch.Tensor]] = [{} for _ in ids]
    ran: list[list[np.ndarray]] = [[] for _ in ids]
    while active:
        now = state if prompt_state is None or cache.lengths.any() else prompt_state
        of_pass = list(map(Document, pieces))
        found, report = read_tokens(decoder, cache, active, of_pass, VOCABULARY, now, report_ran=True)
        for sequence, row in zip(active, found, strict=True):
            logits[sequence][at[sequence]] = row
        for sequence, of_piece in zip(active, ran_in(report, pieces), strict=True):
            ran[sequence].append(of_piece)
        active = [sequence for sequence in active if at[sequence] < len(ids[sequence])]
        pieces = [ids[sequence][at[sequence] : at[sequence] + 1] for sequence in active]
        for sequence in active:
            at[sequence] += 1
    return logits, [np.concatenate(of_text) for of_text in ran], cache


@pytest.mark.parametrize("name", MODELS)
def test_token_by_token_equals_one_pass(name: str) -> None:
    towers, changes = MODELS[name]
    model = tiny_config(towers, context_tokens=64, vocab_tokens=VOCABULARY.size, **changes)
    state, decoder = routing_of(model), perturbed(model).eval()
    for dtype in (torch.float64, torch.float32)[: 2 if name in IN_FP32 else 1]:
        decoder = decoder.to(dtype)
        expected, expected_ran = in_one_pass(decoder, state)
        logits, ran, cache = token_by_token(decoder, state)
        scale, worst = max(float(each.abs().max()) for each in expected), 0.0
        for text, (found, wanted) in enumerate(zip(logits, expected, strict=True)):
            assert list(found) == list(range(PROMPTS[text], len(wanted) + 1))
            far = max(float((row - wanted[tokens - 1]).abs().max()) for tokens, row in found.items())
            worst = max(worst, far / scale)
        assert worst <= TOLERANCE[dtype], f"{dtype}: {worst:.3g}"
        for found, wanted in zip(ran, expected_ran, strict=True):
            np.testing.assert_array_equal(found, wanted)
        if model.depth:
            share = np.concatenate(expected_ran).mean()
            assert 0.2 < share < 0.8, f"a share of {share} hides mistaken choices"
        assert cache.held_bytes == expected_bytes(model, expected_ran, decoder)


def expected_bytes(model: ModelConfig, ran: Sequence[np.ndarray], decoder: Decoder) -> int:
    """Bytes of keys and values by the ledger: of all tokens, or of those that ran where skipped tokens are
    no keys."""
    tokens = sum(map(len, texts()))
    keys = tokens * model.num_layers
    if model.depth_block.keys == "selected":
        keys = int(sum(of_text.sum() for of_text in ran))
    else:
        one = sum(kv_numbers_per_token(model, modality) for modality in model.towers) / len(model.towers)
        assert keys * 2 * model.kv_heads * model.head_dim == one * tokens
    return keys * 2 * model.kv_heads * model.head_dim * next(decoder.parameters()).element_size()
