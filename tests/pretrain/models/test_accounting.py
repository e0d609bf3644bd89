from dataclasses import replace
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_mask
from torch.utils.flop_counter import FlopCounterMode

from pretrain.config import load
from pretrain.models.accounting import (
    MODULES,
    active_parameters,
    describe,
    flops_per_pair,
    flops_per_token,
    forward_flops,
    module_costs,
    sublayer_costs,
    total_parameters,
    train_flops,
    visible_pairs,
)
from pretrain.models.attention_mask import visible
from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.models.dropout import DropoutDraw
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.train.expert_steps import rows_taken
from tests.pretrain.models.random_batch import (
    DENSE,
    ELEMENTS,
    IMAGE_SPEECH_SHARED,
    MOT,
    TWO_TOWERS,
    random_batch,
    tiny_config,
)

CONFIGS = {
    "dense": (DENSE, {}),
    "mot": (MOT, {}),
    "mot_2": (TWO_TOWERS, {"norm_placement": "pre"}),
    "image_speech_shared": (IMAGE_SPEECH_SHARED, {}),
    "all_heads": (MOT, {"num_kv_heads": None}),
    "one_key": (MOT, {"num_kv_heads": 1, "qk_norm": False}),
    "only_attention_untied": (MOT, {"untied": ["attention"]}),
    "only_norm_untied": (MOT, {"untied": ["norm"], "num_layers": 3}),
    "qkv_and_final_norm_untied": (MOT, {"untied": ["qkv", "final_norm"], "num_layers": 3}),
    "out_block_norm_and_head_untied": (
        IMAGE_SPEECH_SHARED,
        {"untied": ["attention_out", "block_norm", "head"]},
    ),
    "qk_norm_and_embedding_untied": (MOT, {"untied": ["qk_norm", "embedding"]}),
    "tied_embeddings": (MOT, {"tied_embeddings": True}),
    "tied_per_tower": (MOT, {"untied": ["embedding", "head"], "tied_embeddings": True}),
    "wide_heads": (MOT, {"head_size": 6}),
    "wide": (MOT, {"ffn_hidden": None, "d_model": 24}),
    "elements": (MOT, ELEMENTS),
    "layer_norm_tied": (MOT, {"norm": "layer", "qkv_bias": True, "untied": ["feed_forward"]}),
    "moe_4x": (DENSE, {"experts": {"all": {"num_experts": 4}}}),
    "moe_tied": (DENSE, {"experts": {"all": {"num_experts": 4}}, "untied": []}),
    "wider_capacity": (MOT, {"experts": {"text": {"num_experts": 3, "capacity_factor": 1.25}}}),
    "token_choice": (
        IMAGE_SPEECH_SHARED,
        {"experts": {"other": {"num_experts": 3, "routing": "token_choice", "top_k": 2, "ffn_hidden": 12}}},
    ),
}
configs = pytest.mark.parametrize(("towers", "changes"), CONFIGS.values(), ids=CONFIGS.keys())


def module_of(name: str) -> str:
    """The ledger's module of a decoder's parameter."""
    layer = name.rpartition(".")[0].removesuffix(".weight").removesuffix(".bias")
    if layer.endswith("_norm"):
        return "norm"
    return layer if layer in MODULES else layer.split(".")[2]


@configs
def test_parameters_equal_those_counted(towers: dict[str, str], changes: dict) -> None:
    config = tiny_config(towers, **changes)
    decoder = Decoder(config)
    counted = {module: dict.fromkeys(cost.parameters, 0) for module, cost in module_costs(config).items()}
    for name, parameter in decoder.named_parameters():
        counted[module_of(name)][name.rpartition(".")[2]] += parameter.numel()
    assert counted == {module: cost.parameters for module, cost in module_costs(config).items()}
    assert total_parameters(config) == sum(parameter.numel() for parameter in decoder.parameters())
    for modality, tower in config.towers.items():
        met = [p.numel() for name, p in decoder.named_parameters() if name.endswith((f".{tower}", ".shared"))]
        experts = config.experts.get(tower)
        if experts is not None:
            one = 3 * config.d_model * config.width_of(tower) * config.num_layers
            met.append(round((experts.experts_per_token - experts.num_experts) * one))
        assert active_parameters(config, modality) == sum(met)


@pytest.mark.diagonal
@configs
@pytest.mark.parametrize("present", [None, (0,)], ids=["all_modalities", "text_only"])
def test_flops_equal_torchs_counter(towers: dict[str, str], changes: dict, present: tuple | None) -> None:
    config = tiny_config(towers, **changes)
    inputs = build_inputs(random_batch(config, padding_tokens=0, present=present), config)
    inputs = replace(inputs, dropout=DropoutDraw(0, 0, range(2)))
    tokens = dict(zip(config.modalities, inputs.input_tokens, strict=True))
    # Attention as plain products, the one form that torch's counter knows on CPU: it has every pair of a
    # document.
    pairs = sum(n * n for n in inputs.mask.segments)
    decoder = Decoder(config)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            decoder(inputs)
        with FlopCounterMode(display=False) as training:
            objective, _, report = Pretraining(decoder)(inputs)
            objective.backward()
        rows = rows_taken(config, report)
    assert forward.get_total_flops() == forward_flops(config, tokens, pairs, rows)
    assert training.get_total_flops() == train_flops(config, tokens, pairs, rows)
    sequences = inputs.mask.documents.shape[0]
    for tower, taken in rows.items():
        experts = config.experts[tower]
        of_tower = inputs.routing.tokens[config.tower_names.index(tower)]
        expected = experts.experts_per_token * sum(of_tower.per_sequence)
        layers = config.num_layers
        assert 0 <= taken - layers * expected <= layers * sequences * (experts.num_experts - 1)


def test_visible_pairs_are_those_of_the_mask() -> None:
    config = tiny_config(MOT)
    inputs = build_inputs(random_batch(config, sequences=3, padding_tokens=0), config)
    seen = create_mask(visible(inputs.mask.documents), 3, 1, 12, 12, device="cpu")
    assert visible_pairs(inputs.mask.segments) == int(seen.sum()) == inputs.visible_pairs


def test_a_pair_costs_a_score_and_a_share_of_a_value() -> None:
    config = tiny_config(MOT)
    assert flops_per_pair(config) == 2 * (2 * 4 * 4) * 2  # (4 heads x head_dim 4) twice, 2 layers
    assert forward_flops(config, {"text": 2, "image": 1}, 5) == (
        2 * sum(flops_per_token(config, "text").values())
        + sum(flops_per_token(config, "image").values())
        + 5 * flops_per_pair(config)
    )


RUNS = Path("pretrain/configs/runs")
PAPER = {
    # Millions: dense, MoT with 2 and with 3 towers. The paper's sizes follow from matrices alone, without
    # norms.
    "mot_37m": (37.0, 40.4, 43.8),
    "mot_94m": (94.4, 121.6, 148.9),
    "mot_443m": (442.5, 750.8, 1059.1),
    "mot_880m": (880.8, 1560.3, 2239.8),
    "mot_1b5": (1501.6, 2734.7, 3967.8),
    "mot_7b": (7012.9, 13488.9, 19964.9),
}


def matrices(config: ModelConfig) -> float:
    """Parameters in millions, norm weights left out."""
    norms = sum(module_costs(config)["norm"].parameters.values())
    qk_norms = 2 * config.head_dim * config.num_layers * len(config.shards_of("qk_norm"))
    return (total_parameters(config) - norms - qk_norms) / 1e6


@pytest.mark.parametrize("name", PAPER)
def test_paper_sizes_reproduce_its_table(name: str) -> None:
    mot = load(RUNS / f"{name}.toml").model
    dense = load(RUNS / f"{name}.toml", ['model.towers={text="all", image="all", speech="all"}']).model
    two = mot.model_copy(update={"towers": {"text": "text", "image": "image"}})
    assert [round(matrices(config), 1) for config in (dense, two, mot)] == list(PAPER[name])
    for modality in mot.modalities:
        assert active_parameters(mot, modality) == total_parameters(dense), "equal compute per token"
        assert flops_per_token(mot, modality) == flops_per_token(dense, modality)


TRANSFUSION = {"163m": 162.4, "760m": 777.8, "1b4": 1364.2, "7b": 6738.1}
"""Millions of parameters of the dense models with 32,000 ids, adapters left out."""


@pytest.mark.parametrize("size", TRANSFUSION)
def test_sizes_of_transfusion_reproduce_the_papers(size: str) -> None:
    path, ids = RUNS / f"transfusion_{size}.toml", "model.vocab_tokens=32_000"
    mot = load(path).model
    dense = load(path, ['model.towers={text="all", image="all"}', ids]).model
    adapters = sum(module_costs(dense)["vectors"].parameters.values()) / 1e6
    assert round(matrices(dense) - adapters, 1) == TRANSFUSION[size]
    assert flops_per_token(mot, "image")["vectors"] == 2 * 2 * 32 * mot.d_model


def test_describe_states_the_ledgers_sums() -> None:
    config = load(RUNS / "mot_7b.toml").model
    text = describe(config)
    assert f"{total_parameters(config):,}" in text
    assert f"{active_parameters(config, 'image'):,}" in text
    one_document = visible_pairs([4096])
    training = train_flops(config, {"text": 4096}, one_document) // 4096
    assert f"{training:,}" in text
    partly = describe(config.model_copy(update={"untied": ("attention",)}), document_tokens=100)
    assert "tied between them: feed_forward, norm" in partly
    assert "documents of 100 tokens" in partly


@pytest.mark.parametrize("document_tokens", [None, 8])
def test_sublayers_cost_together_what_a_forward_pass_costs(document_tokens: int | None) -> None:
    config = tiny_config(MOT, context_tokens=32, num_layers=3)
    costs = sublayer_costs(config, document_tokens)
    pairs = visible_pairs([32] if document_tokens is None else [8, 8, 8, 8])
    assert len(costs) == 8 and costs[0] == 0 and costs[1] == costs[5] > 0
    assert sum(costs) == forward_flops(config, {"text": 20, "image": 12}, pairs)
