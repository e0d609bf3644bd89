"""Settings of parameters by tower and by pattern."""

import pytest

from pretrain.models.logical_weights import logical_shapes
from pretrain.optimizer_config import OptimizerConfig
from pretrain.parameter_settings import settings_of
from tests.pretrain.models.random_batch import MOT, tiny_config


def test_the_last_pattern_that_matches_wins_key_by_key() -> None:
    model = tiny_config(MOT, experts={"image": {"num_experts": 4}})
    optimizer = OptimizerConfig.model_validate(
        {
            "learning_rate": 1.0,
            "weight_decay": 0.3,
            "towers": {"image": {"lr_scale": 0.25}, "speech": {"frozen": True}},
            "groups": [
                {"match": "*.weight.image", "weight_decay": 0.2},
                {"match": "*.router.*", "lr_scale": 4.0},
                {"match": "blocks.1.*.qkv.weight.*", "lr_scale": 2.0, "frozen": False},
                {"match": "embedding.*", "frozen": True},
            ],
        }
    )
    shapes = logical_shapes(model)
    found = {name: settings_of(name, shape, optimizer, model) for name, shape in shapes.items()}
    expected = {
        "blocks.0.attention.qkv.weight.text": (1.0, 0.3),
        "blocks.0.attention.qkv.weight.image": (0.25, 0.2),
        "blocks.0.attention_norm.weight.image": (0.25, 0.0),  # norms are never decayed
        "blocks.0.feed_forward.router.weight.image": (4.0, 0.0),
        "blocks.1.attention.qkv.weight.text": (2.0, 0.3),
        "blocks.1.attention.qkv.weight.image": (2.0, 0.2),
        "blocks.1.attention.qkv.weight.speech": (2.0, 0.3),
        "head.weight.shared": (1.0, 0.3),
    }
    trained = {name: (own.lr_scale, own.weight_decay) for name, own in found.items() if own is not None}
    assert {name: trained[name] for name in expected} == expected
    assert {name for name, own in found.items() if own is None} == {
        name for name in shapes if name.startswith("embedding") or name.endswith(".speech")
    } - {"blocks.1.attention.qkv.weight.speech"}


def test_muon_takes_matrices_of_blocks_at_its_own_rate_and_decay() -> None:
    model = tiny_config(MOT, experts={"image": {"num_experts": 4}}, mup_base_width=4)
    muon = {"learning_rate": 0.02, "weight_decay": 0.05, "adjust_lr": "original"}
    values = {"learning_rate": 1e-3, "weight_decay": 0.1, "kind": "muon", "muon": muon}
    optimizer = OptimizerConfig.model_validate(values | {"towers": {"image": {"lr_scale": 0.5}}})
    shapes = logical_shapes(model)
    found = {name: settings_of(name, shape, optimizer, model) for name, shape in shapes.items()}
    pieces = {name: own.pieces for name, own in found.items() if own is not None and own.pieces is not None}
    stems = {name.split(".", 2)[2].rpartition(".weight")[0] for name in pieces}
    assert stems == {"attention.qkv", "attention.out", "feed_forward.gate_up", "feed_forward.down"}
    assert pieces["blocks.0.attention.qkv.weight.text"] == (16, 8, 8)
    assert pieces["blocks.0.feed_forward.gate_up.weight.image"] == (24, 24)
    assert pieces["blocks.1.attention.out.weight.speech"] == (16,)
    out = found["blocks.1.attention.out.weight.image"]
    assert out is not None and out.weight_decay == 0.05
    assert out.lr_scale == pytest.approx(10)  # 0.02 / 1e-3 / 2, whatever the width
    router, head = found["blocks.0.feed_forward.router.weight.image"], found["head.weight.shared"]
    assert router is not None and head is not None
    assert (router.lr_scale, head.lr_scale, head.weight_decay) == (0.5 / 4, 1.0, 0.1)
    matched = OptimizerConfig.model_validate(values | {"muon": {}})
    plain = settings_of("blocks.0.attention.out.weight.text", (16, 16), matched, model)
    assert plain is not None and (plain.lr_scale, plain.weight_decay) == (0.5, 0.2)  # ratio 4: its root
