"""Parameters that patterns freeze, slow down or decay otherwise train on every layout as in one process."""

from typing import Any

import pytest
import torch

from pretrain.models.decoder import Decoder
from pretrain.models.pretraining import Pretraining
from tests.numerics.layouts import assert_all_equal_one_process, groups_of, model_config, one_process


@pytest.mark.parametrize(
    "layouts",
    [
        [{"zero_stage": 0}, {"zero_stage": 2}, {"zero_stage": 3}],
        pytest.param([{"zero_stage": 1}], marks=pytest.mark.full),
        [{"zero_stage": 0, "tp": 2}],
        [{"zero_stage": 1, "pp": 2}],
    ],
    ids=str,
)
def test_two_ranks_equal_one_process(layouts: list[dict[str, Any]]) -> None:
    """Losses and the norms of towers, in which frozen parameters have no part; and a model that is twice as
    wide as its base."""
    assert_all_equal_one_process(2, [(layout, ("grouped", "wide")) for layout in layouts])


def test_the_variant_freezes_and_its_rates_act() -> None:
    """A negative control: without the patterns the norms and later losses are others."""
    module = Pretraining(Decoder(model_config("grouped"), seed=5))
    groups_of(module, "grouped")
    frozen = {n for n, parameter in module.named_parameters() if not parameter.requires_grad}
    assert {"decoder.embedding.weight.shared", "decoder.final_norm.weight.text"} < frozen
    assert any(".router." in name for name in frozen) and not any("gate_up" in name for name in frozen)
    grouped, plain = (one_process(name, torch.float64) for name in ("grouped", "auxiliary"))
    assert grouped[0].stats == plain[0].stats and grouped[0].grad_norm < plain[0].grad_norm
    assert grouped[1].stats != plain[1].stats
