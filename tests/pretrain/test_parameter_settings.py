"""Settings of parameters by tower and by pattern."""

from pretrain.config import OptimizerConfig
from pretrain.models.logical_weights import logical_shapes
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
