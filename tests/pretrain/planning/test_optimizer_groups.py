"""The table of the optimizer's groups counts every parameter once and names rates."""

import math

from pretrain.models.logical_weights import logical_shapes
from pretrain.optimizer_config import OptimizerConfig
from pretrain.planning.optimizer_groups import describe_groups
from tests.pretrain.planning.test_layout_plan import run_config


def test_every_parameter_is_counted_once() -> None:
    config = run_config()
    optimizer = OptimizerConfig.model_validate(
        {
            "learning_rate": 0.002,
            "towers": {"image": {"lr_scale": 0.5}},
            "groups": [{"match": "embedding.*", "frozen": True}, {"match": "*.qkv.*", "weight_decay": 0.0}],
        }
    )
    lines = describe_groups(config.model_copy(update={"optimizer": optimizer})).splitlines()
    rows = {name: cells for name, *cells in (line.split() for line in lines[1:])}
    shapes = logical_shapes(config.model)
    assert sum(int(cells[0].replace(",", "")) for cells in rows.values()) == sum(
        map(math.prod, shapes.values())
    )
    embedding = math.prod(shapes["embedding.weight.shared"])
    qkv = 3 * math.prod(shapes["blocks.0.attention.qkv.weight.image"])
    assert rows["shared/frozen"] == [f"{embedding:,}", "-", "-"]
    assert rows["image/decay+1"] == [f"{qkv:,}", "0.001", "0"]
    assert rows["text/decay"][1:] == ["0.002", "0.1"]


def test_layers_that_no_pattern_tells_apart_are_counted_together() -> None:
    """The same pattern written with a bracket, which might tell blocks apart, goes through all of them. Every
    second block has a depth router."""
    model = {"depth": {"image": {"schedule": "alternating", "mean_ratio": 0.8, "rule": "top_k"}}}
    short, whole = (
        describe_groups(
            run_config(model).model_copy(
                update={
                    "optimizer": OptimizerConfig.model_validate(
                        {"learning_rate": 0.002, "groups": [{"match": pattern, "lr_scale": 3.0}]}
                    )
                }
            )
        )
        for pattern in ("*.qkv.*", "*[.]qkv.*")
    )
    assert short == whole and "+0" in short
    layers = run_config(model).model
    assert layers.ratios_of_layers() == [layers.depth_ratios(i) for i in range(3)] != [{}] * 3
