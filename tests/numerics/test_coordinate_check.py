"""Maximal update parametrisation: what training adds to activations is equally large at every width.

The coordinate check of arXiv 2203.03466, appendix D.1: the same few steps at widths 64 to 512, and the change
of every activation since the first step.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.optimizer_config import OptimizerConfig
from pretrain.parameter_settings import settings_of
from pretrain.train.optimizer import parameter_groups
from tests.pretrain.models.random_batch import TWO_TOWERS, random_batch, tiny_config

WIDTHS = (64, 128, 256, 512)
STEPS = 4
EXPERTS = {"image": {"num_experts": 4, "routing": "token_choice", "top_k": 2}}


def _model(width: int, base: int | None) -> Pretraining:
    config = tiny_config(
        TWO_TOWERS,
        d_model=width,
        num_heads=width // 16,
        num_kv_heads=width // 32,
        head_size=16,
        ffn_hidden=2 * width,
        context_tokens=32,
        init_std=0.04,
        norm_placement="pre",
        experts=EXPERTS,
        mup_base_width=base,
    )
    return Pretraining(Decoder(config, seed=3))


def _activations(module: Pretraining, inputs: ModelInputs) -> dict[str, torch.Tensor]:
    """Activations by the name of the layer that makes them."""
    found: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    hooks = [
        layer.register_forward_hook(keep(name))
        for name, layer in module.decoder.named_modules()
        if name.rpartition(".")[2] in ("attention", "feed_forward", "router")
    ]
    with torch.no_grad():
        found["logits"] = module.decoder(inputs)
    for hook in hooks:
        hook.remove()
    return found


def _changes(width: int, base: int | None, **optimizer_keys: Any) -> dict[str, float]:
    """By layer the mean size of what STEPS steps change of its activations."""
    module = _model(width, base)
    config = OptimizerConfig.model_validate({"learning_rate": 8e-3, "weight_decay": 0.0, **optimizer_keys})
    groups = parameter_groups(module.named_parameters(), config, module.decoder.config)
    optimizer = config.spec.build(
        [dict(group, lr=config.learning_rate * group["lr_scale"]) for group in groups]
    )
    inputs = build_inputs(random_batch(module.decoder.config, sequences=4), module.decoder.config)
    before = _activations(module, inputs)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (module(inputs)[0] / inputs.weight).backward()
        optimizer.step()
    return {name: float((x - before[name]).abs().mean()) for name, x in _activations(module, inputs).items()}


def _growth(
    base: int | None, widths: Sequence[int] = WIDTHS, **optimizer_keys: Any
) -> dict[str, list[float]]:
    changes = [_changes(width, base, **optimizer_keys) for width in widths]
    return {name: [change[name] / changes[0][name] for change in changes] for name in changes[0]}


def test_changes_are_flat_with_a_base_width() -> None:
    """Changes of sublayers are 0.82 to 0.94 times those at the base width. Logits and scores of routers fall
    to 0.46 at 8 times the width: the part of their changes that comes from their own initial values vanishes
    as 1 / sqrt(ratio)."""
    for name, growth in _growth(WIDTHS[0]).items():
        lowest = 0.3 if name == "logits" or name.endswith("router") else 0.7
        assert all(lowest <= of_width <= 1.3 for of_width in growth), (name, growth)


@pytest.mark.parametrize(("adjust_lr", "rate"), [("original", 0.02), ("match_rms_adamw", 8e-3)])
def test_changes_by_muon_are_flat_too(adjust_lr: str, rate: float) -> None:
    """Changes of sublayers are 0.96 to 1.05 times those at the base width, also at 8 times the width."""
    muon = {"adjust_lr": adjust_lr, "learning_rate": rate}
    for name, growth in _growth(WIDTHS[0], (64, 256), kind="muon", muon=muon).items():
        lowest = 0.3 if name == "logits" or name.endswith("router") else 0.7
        assert all(lowest <= of_width <= 1.3 for of_width in growth), (name, growth)


def test_changes_grow_with_the_width_without_it() -> None:
    """The control: at 8 times the width logits change 3.8 times as much, a sublayer up to 98 times."""
    growth = _growth(None)
    assert all(of_layer[-1] > 3 and of_layer == sorted(of_layer) for of_layer in growth.values()), growth


def test_the_base_width_itself_changes_nothing() -> None:
    plain, base = (_model(WIDTHS[0], width) for width in (None, WIDTHS[0]))
    inputs = build_inputs(random_batch(base.decoder.config), base.decoder.config)
    config = OptimizerConfig(learning_rate=1.0)
    groups = [
        [
            (group["name"], group["lr_scale"], group["weight_decay"], len(group["params"]))
            for group in parameter_groups(module.named_parameters(), config, module.decoder.config)
        ]
        for module in (plain, base)
    ]
    assert groups[0] == groups[1]
    for (name, a), b in zip(plain.named_parameters(), base.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(plain(inputs)[0], base(inputs)[0])


def test_each_kind_of_weight_follows_the_width_as_the_table_says() -> None:
    """Ratio 2. Table 8 of the paper for Adam: input and output weights keep value and rate, logits are
    halved; hidden weights have half the variance and half the rate. Decay is doubled, since AdamW halves it
    too."""
    small, wide = _model(128, None), _model(128, 64)
    config = OptimizerConfig(learning_rate=1.0, weight_decay=0.1)
    for (name, a), b in zip(small.named_parameters(), wide.parameters(), strict=True):
        own = settings_of(name.removeprefix("decoder."), tuple(a.shape), config, wide.decoder.config)
        assert own is not None
        outer = a.ndim == 1 or "embedding" in name or "head" in name
        spread = 1.0 if outer else 2.0 if "router" in name else 2**0.5
        torch.testing.assert_close(b * spread, a, rtol=1e-6, atol=0, msg=name)
        decay = 0.0 if a.ndim == 1 or "router" in name else 0.1 if outer else 0.2
        assert (own.lr_scale, own.weight_decay) == (1.0 if outer else 0.5, decay), name
    inputs = build_inputs(random_batch(wide.decoder.config), wide.decoder.config)
    with torch.no_grad():
        for a, b in zip(small.parameters(), wide.parameters(), strict=True):
            b.copy_(a)
        assert torch.equal(wide.decoder(inputs) * 2, small.decoder(inputs))
