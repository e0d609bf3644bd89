"""Groups of a decoder's parameters."""

from pretrain.models.config import ModelConfig
from pretrain.models.decoder import Decoder
from pretrain.optimizer_config import OptimizerConfig, TowerOptimizerConfig
from pretrain.train.optimizer import parameter_groups
from tests.pretrain.models.random_batch import MOT, tiny_config


def _decoder() -> Decoder:
    towers = {"text": "text", "image": "image", "speech": "speech"}
    return Decoder(
        ModelConfig(
            num_layers=2,
            d_model=16,
            num_heads=2,
            context_tokens=8,
            vocab_tokens=32,
            ffn_hidden=16,
            towers=towers,
        )
    )


def test_every_parameter_is_in_one_group_and_norms_are_not_decayed() -> None:
    decoder = _decoder()
    groups = parameter_groups(
        decoder.named_parameters(), OptimizerConfig(learning_rate=1.0, weight_decay=0.3), decoder.config
    )
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    grouped = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert {group["tower"] for group in groups} == {"text", "image", "speech", "shared"}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert name.endswith(f".{group['tower']}")
            # Vectors are norm weights, whole on every tensor-parallel rank.
            kind = "no_decay/whole" if parameter.ndim == 1 else "decay/cut"
            assert group["name"] == f"{group['tower']}/{kind}"
            assert (parameter.ndim == 1) == (group["weight_decay"] == 0)
        assert group["lr_scale"] == 1.0
        assert group["weight_decay"] in (0.0, 0.3)


def test_routers_of_experts_are_matrices_that_are_not_decayed() -> None:
    decoder = Decoder(tiny_config(MOT, experts={"image": {"num_experts": 4}}))
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.3)
    groups = {
        group["name"]: group for group in parameter_groups(decoder.named_parameters(), config, decoder.config)
    }
    group = groups["image/no_decay/whole"]
    held = {id(parameter) for parameter in group["params"]}
    routers = [parameter for name, parameter in decoder.named_parameters() if ".router." in name]
    assert routers and all(router.ndim == 2 and id(router) in held for router in routers)
    assert group["weight_decay"] == 0


def test_a_tower_has_its_own_factor_decay_and_freezing() -> None:
    decoder = _decoder()
    config = OptimizerConfig(
        learning_rate=1.0,
        towers={
            "image": TowerOptimizerConfig(lr_scale=0.25, weight_decay=0.0),
            "speech": TowerOptimizerConfig(frozen=True),
        },
    )
    groups = {
        group["name"]: group for group in parameter_groups(decoder.named_parameters(), config, decoder.config)
    }
    assert set(groups) == {
        f"{tower}/{kind}" for tower in ("text", "image") for kind in ("decay/cut", "no_decay/whole")
    } | {"shared/decay/cut"}
    assert groups["image/decay/cut"]["lr_scale"] == groups["image/no_decay/whole"]["lr_scale"] == 0.25
    assert groups["image/decay/cut"]["weight_decay"] == 0.0
    assert groups["text/decay/cut"]["weight_decay"] == config.weight_decay
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (not name.endswith(".speech")), name
