import numpy as np
import torch
from torch.nn import functional as F

from parallel.routing import route
from pretrain.models.feed_forward import FeedForward, swiglu
from pretrain.models.initial_weights import InitialWeights
from tests.pretrain.models.random_batch import MOT, tiny_config

ROUTING = route(np.array([0, 0, 1, 1, 1, 2]), (0, 1, 2), 3)


def test_swiglu_gates_the_second_half_by_the_first() -> None:
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(swiglu(x), F.silu(gate) * up)
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_width_is_the_configs() -> None:
    config = tiny_config(MOT, ffn_hidden=None)
    layer = FeedForward(config, "feed_forward", InitialWeights.of(config, 1))
    assert layer.gate_up.weight["image"].shape == (2 * 256, 16)
    assert layer.down.weight["image"].shape == (16, 256)


def test_each_tower_has_its_feed_forward() -> None:
    config = tiny_config(MOT)
    layer = FeedForward(config, "feed_forward", InitialWeights.of(config, 1))
    x = torch.randn(6, config.d_model)
    before, _ = layer(x, ROUTING)
    with torch.no_grad():
        layer.gate_up.weight["image"].mul_(2)
    changed = (layer(x, ROUTING)[0] != before).any(dim=1)
    assert changed.tolist() == [False, False, True, True, True, False]
