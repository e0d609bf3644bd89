import math

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.initial_weights import InitialWeights
from tests.pretrain.models.random_batch import DENSE, MOT, tiny_config


def test_a_draw_depends_on_seed_and_name_alone() -> None:
    weights = InitialWeights(seed=1, std=0.02, num_layers=4)
    first, again, other = torch.empty(8, 8), torch.empty(8, 8), torch.empty(8, 8)
    weights.normal("a")(first, "text")
    torch.manual_seed(99)
    torch.randn(5)
    weights.normal("a")(again, "image")
    assert torch.equal(first, again)
    for different in (weights.normal("b"), InitialWeights(2, 0.02, 4).normal("a")):
        different(other, "text")
        assert not torch.equal(first, other)


def test_it_leaves_the_global_generator_alone() -> None:
    state = torch.get_rng_state()
    Decoder(tiny_config(MOT))
    assert torch.equal(torch.get_rng_state(), state)


def test_standard_deviations() -> None:
    weights = InitialWeights(seed=1, std=0.02, num_layers=8)
    plain, residual = torch.empty(400, 400), torch.empty(400, 400)
    weights.normal("x")(plain, "text")
    weights.residual("x")(residual, "text")
    # 160,000 draws: the standard error of a standard deviation is 0.2 %.
    assert float(plain.std()) == pytest.approx(0.02, rel=0.01)
    assert float(residual.std()) == pytest.approx(0.02 / math.sqrt(16), rel=0.01)


def test_towers_start_as_the_dense_model() -> None:
    dense = dict(Decoder(tiny_config(DENSE), seed=3).named_parameters())
    mot = dict(Decoder(tiny_config(MOT), seed=3).named_parameters())
    for name, parameter in mot.items():
        layer, _, shard = name.rpartition(".")
        theirs = dense[name] if shard == "shared" else dense[f"{layer}.all"]
        assert torch.equal(parameter, theirs), name


def test_independent_towers_start_apart_and_the_first_as_ever() -> None:
    """Experts too; norms start as ones either way, and a tied part has one weight."""
    changes = {"untied": ["qkv", "feed_forward", "head"], "experts": {"image": {"num_experts": 2}}}
    copies, apart = (
        dict(Decoder(tiny_config(MOT, towers_start=start, **changes), seed=3).named_parameters())
        for start in ("copies", "independent")
    )
    for name, parameter in apart.items():
        layer, _, shard = name.rpartition(".")
        if shard in ("text", "shared"):
            assert torch.equal(parameter, copies[name]), name
        else:
            others = {other: apart[f"{layer}.{other}"] for other in MOT if f"{layer}.{other}" in apart}
            alike = [other for other, value in others.items() if torch.equal(value, parameter)]
            assert alike == [shard], name
            assert float(parameter.std()) == pytest.approx(float(copies[name].std()), rel=0.2)


def test_layers_differ_from_each_other() -> None:
    blocks = Decoder(tiny_config(DENSE)).blocks
    assert not torch.equal(
        blocks[0].get_parameter("feed_forward.down.weight.all"),
        blocks[1].get_parameter("feed_forward.down.weight.all"),
    )


def test_experts_start_apart_and_the_first_as_the_tower_without_experts() -> None:
    weights = InitialWeights(seed=1, std=0.02, num_layers=4)
    tower, experts = torch.empty(8, 6), torch.empty(3, 8, 6)
    for weight in (tower, experts):
        weights.each(weights.normal, "a")(weight, "text")
    assert torch.equal(experts[0], tower)
    assert not torch.equal(experts[0], experts[1]) and not torch.equal(experts[1], experts[2])
