"""What depth routing saves: torch's own counter, and the published figures of p-MoD."""

from typing import Any

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pretrain.models.accounting import (
    active_parameters,
    describe,
    flops_per_token,
    forward_flops,
    kv_numbers_per_token,
    module_costs,
    sublayer_costs,
    total_parameters,
    train_flops,
    visible_pairs,
)
from pretrain.models.attention import query_pieces
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.depth import DepthRouting
from pretrain.models.depth_accounting import Skipped, expected, over_run
from pretrain.models.inputs import build_inputs
from pretrain.models.logical_weights import logical_shapes
from pretrain.models.pretraining import Pretraining
from pretrain.train import depth_steps
from pretrain.train.expert_steps import rows_taken
from tests.pretrain.models.random_batch import DENSE, IMAGE_SPEECH_SHARED, MOT, random_batch, tiny_config
from tests.pretrain.models.test_accounting import counted_in

PLACES = [{"keys": "all"}, {"keys": "selected"}, {"parts": "feed_forward"}]


def depth(**changes: Any) -> dict[str, Any]:
    table = {"schedule": "constant", "mean_ratio": 0.5, "rule": "top_k", "ramp_frac": 0.0, "dense_frac": 0.0}
    return table | changes


EXPERTS = {
    "none": {},
    "expert_choice": {"num_experts": 3, "capacity_factor": 1.25, "ffn_hidden": 12},
    "token_choice": {"num_experts": 3, "routing": "token_choice", "top_k": 2, "router_z": 0.1},
}


@pytest.mark.pairwise
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("towers", [DENSE, MOT, IMAGE_SPEECH_SHARED], ids=["dense", "mot", "shared"])
def test_flops_equal_torchs_counter(towers: dict[str, str], experts: str, place: dict[str, str]) -> None:
    """Experts of all towers, of tokens with a depth router and of others."""
    config = tiny_config(
        towers, depth={"image": depth(**place), "text": depth(mean_ratio=0.3, **place)},
        num_layers=3, context_tokens=30,
        experts=dict.fromkeys(towers.values(), EXPERTS[experts]) if EXPERTS[experts] else {},
    )  # fmt: skip
    batch = random_batch(config, padding_tokens=0, document_tokens=(3, 12), seed=1)
    inputs = build_inputs(batch, config)
    tokens = dict(zip(config.modalities, inputs.input_tokens, strict=True))
    decoder = Decoder(config)
    # Attention as plain products, the one form that torch's counter knows on CPU: it has every pair of a
    # document's queries and keys, seen or not.
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            decoder(inputs)
        counted = counted_in(decoder)
        with FlopCounterMode(display=False) as training:
            Pretraining(decoder)(inputs)[0].backward()
    seen = depth_steps.skipped(config, counted, inputs.visible_pairs)
    assert seen is not None and all(seen.tokens.values())
    rows = rows_taken(config, counted)
    square = sum(n * n for n in inputs.mask.segments)
    pairs = sum(_pairs_computed(config, inputs, decoder, layer) for layer in range(3))
    hidden = Skipped(seen.tokens, 3 * square - pairs)
    # Neither counts the depth routers' products of a matrix and a vector.
    assert forward.get_total_flops() == forward_flops(config, tokens, square, rows, hidden)
    assert training.get_total_flops() == train_flops(config, tokens, square, rows, hidden)


def _pairs_computed(config: ModelConfig, inputs: Any, decoder: Decoder, layer: int) -> int:
    """Of queries and keys per document, from what ran in the layer: read off by running it again."""
    routing = decoder.blocks[layer].depth
    assert isinstance(routing, DepthRouting)
    seen = []

    def keep(_module: Any, _inputs: Any, chosen: Any) -> None:
        seen.append(chosen.tokens)

    hook = routing.register_forward_hook(keep)
    decoder(inputs)
    hook.remove()
    (tokens,) = seen
    if next(iter(config.depth.values())).parts == "feed_forward":
        return sum(n * n for n in inputs.mask.segments)
    if next(iter(config.depth.values())).keys == "selected":
        return sum(n * n for n in tokens.mask.segments)
    # In pieces, each over the keys of its document up to its last query.
    sizes, spans = query_pieces(tokens.mask)
    return sum(size * (end - first) for size, (first, end) in zip(sizes, spans, strict=True))


def test_parameters_are_those_of_the_decoder() -> None:
    table = depth(schedule="alternating", mean_ratio=0.8)
    config = tiny_config(MOT, depth={"image": table, "speech": depth()}, num_layers=3)
    held = {name: tuple(p.shape) for name, p in Decoder(config).named_parameters()}
    assert logical_shapes(config) == held and list(logical_shapes(config)) == list(held)
    assert total_parameters(config) == sum(p.numel() for p in Decoder(config).parameters())
    assert module_costs(config)["depth"].parameters == {"image": 16, "speech": 48}
    plain = tiny_config(MOT, num_layers=3)
    more = {m: active_parameters(config, m) - active_parameters(plain, m) for m in config.towers}
    assert more == {"text": 0, "image": 16, "speech": 48}


LLAVA = {
    "num_layers": 32, "d_model": 4096, "num_heads": 32, "ffn_hidden": 11008, "vocab_tokens": 32_000,
    "context_tokens": 2048, "towers": {"text": "all", "image": "all"}, "norm_placement": "pre",
    "qk_norm": False,
}  # fmt: skip


@pytest.mark.parametrize("text", [43, 63])
def test_p_mod_7b(text: int) -> None:
    """LLaVA-1.5: 576 image tokens; keys 53.8 %, FLOPs of the prefill 58.7 % (p-MoD, table 1)."""
    table = depth(schedule="cosine", mean_ratio=0.5375, keys="selected", scale="all_as_released")
    config = ModelConfig.model_validate(LLAVA | {"depth": {"image": table}})
    dense = ModelConfig.model_validate(LLAVA)
    tokens = {"text": text, "image": 576}
    pairs = visible_pairs([text + 576])
    ratio = forward_flops(config, tokens, pairs) / forward_flops(dense, tokens, pairs)
    assert ratio == pytest.approx(
        0.587, abs=0.02
    )  # 0.576 and 0.589; keys are those of whole ratios, not of trunc(576 R)
    kept = kv_numbers_per_token(config, "image") / kv_numbers_per_token(dense, "image")
    assert kept == pytest.approx(0.538, abs=1e-3)
    assert kv_numbers_per_token(config, "text") == kv_numbers_per_token(dense, "text") == 2 * 4096 * 32
    all_keys = ModelConfig.model_validate(LLAVA | {"depth": {"image": table | {"keys": "all"}}})
    assert kv_numbers_per_token(all_keys, "image") == kv_numbers_per_token(dense, "image")
    assert forward_flops(dense, tokens, pairs) == pytest.approx(8.38e12, rel=0.05)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_expected_costs_add_up(place: dict[str, str], experts: str) -> None:
    """Sublayers, tokens and the whole agree where every modality has as many tokens."""
    table = depth(schedule="cosine", mean_ratio=0.6, **place)
    shape = {"num_layers": 6, "context_tokens": 24}
    shape |= {"experts": {"image": EXPERTS[experts]}} if EXPERTS[experts] else {}
    config = tiny_config(MOT, depth={"image": table, "speech": table}, **shape)
    tokens = dict.fromkeys(MOT, 8)
    total = forward_flops(config, tokens, visible_pairs([24]))
    assert sum(sublayer_costs(config)) == pytest.approx(total, rel=1e-4)
    dense = sublayer_costs(tiny_config(MOT, **shape))
    costs = sublayer_costs(config)
    assert costs[:3] == dense[:3] and costs[-1] == dense[-1]
    assert costs[11] <= dense[11] and costs[12] < dense[12]  # the last block skips most
    assert (costs[11] == dense[11]) == (place.get("parts") == "feed_forward")
    plain = {m: flops_per_token(tiny_config(MOT, **shape), m) for m in MOT}
    assert flops_per_token(config, "text") == plain["text"] | {"depth": 0}
    for modality in ("image", "speech"):
        saved = {key: n - flops_per_token(config, modality)[key] for key, n in plain[modality].items()}
        assert saved["feed_forward"] == pytest.approx(0.4 * plain[modality]["feed_forward"], abs=0.5)


def test_describe_tells_ratios_and_what_is_saved() -> None:
    config = tiny_config(MOT, depth={"image": depth(schedule="alternating", mean_ratio=0.75)}, num_layers=4)
    told = describe(config)
    assert "depth of image: alternating, mean 0.75, top_k (looks at later tokens)" in told
    assert "layers 1 0.50 1 0.50" in told and "after warm-up" in told


@pytest.mark.parametrize("place", PLACES, ids=str)
def test_what_a_whole_run_skips_is_the_mean_of_its_steps(place: dict[str, str]) -> None:
    config = tiny_config(
        MOT, depth={"image": depth(dense_frac=0.1, ramp_frac=0.3, **place), "text": depth(**place)}
    )
    tokens, steps = {"text": 7, "image": 20, "speech": 3}, 2000
    each = [expected(config, tokens, 900, (step + 0.5) / steps) for step in range(steps)]
    whole = over_run(config, tokens, 900)
    assert whole is not None
    assert whole.pairs == pytest.approx(sum(at.pairs for at in each) / steps, rel=1e-5)
    for modality in tokens:
        mean = sum(at.tokens[modality] for at in each) / steps
        assert whole.tokens[modality] == pytest.approx(mean, rel=1e-5)
    assert whole.tokens["text"] > 0 == whole.tokens["speech"]
    assert whole.tokens["text"] == pytest.approx(expected(config, tokens, 900).tokens["text"], rel=1e-9)
    assert over_run(tiny_config(MOT), tokens, 900) is None
