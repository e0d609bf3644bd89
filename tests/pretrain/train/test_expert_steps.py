"""What forward passes count, and what is made of it."""

import pytest

from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.routing_state import counts_in
from pretrain.train import expert_steps
from pretrain.train.thresholds import RouterCounts, next_thresholds
from tests.pretrain.models.random_batch import MOT, random_batch, tiny_config

CONFIG = tiny_config(
    MOT,
    context_tokens=64,
    experts={
        "text": {"num_experts": 4},
        "image": {"num_experts": 3, "routing": "token_choice", "top_k": 2, "router_z": 0.1},
    },
)


@pytest.fixture(scope="module")
def counted() -> dict[str, RouterCounts]:
    """Of two training passes, and an evaluation that must not count."""
    decoder = Decoder(CONFIG)
    for seed, training in ((1, True), (2, True), (3, False)):
        decoder.train(training)(build_inputs(random_batch(CONFIG, sequences=4, seed=seed), CONFIG))
    found = {}
    for counts in counts_in(decoder):
        values = counts.take().numpy()
        found[counts.name] = RouterCounts(values[:-8], tuple(values[-8:]))
    return found


def format_tokens(tower: int) -> int:
    inputs = [build_inputs(random_batch(CONFIG, sequences=4, seed=seed), CONFIG) for seed in (1, 2)]
    return sum(sum(each.routing.tokens[tower].per_sequence) for each in inputs)


def test_every_place_counts_under_its_name(counted: dict[str, RouterCounts]) -> None:
    assert list(counted) == list(expert_steps.places(CONFIG)) and len(counted) == 2 * (4 + 3)
    sums = expert_steps.step_sums(CONFIG, counted)
    for layer in range(2):
        assert sums[f"experts/tokens/text/{layer}"] == format_tokens(0)
        assert sums[f"experts/tokens/image/{layer}"] == format_tokens(1)
        assert sums[f"experts/dropped/image/{layer}"] == 0 < sums[f"experts/dropped/text/{layer}"]
        assert sum(sums[f"experts/taken/image/{layer}/{e}"] for e in range(3)) == 2 * format_tokens(1)
        assert sums[f"experts/router_z/image/{layer}"] > 0 == sums[f"experts/load_balance/image/{layer}"]
    taken = [value for name, value in sums.items() if name.startswith("experts/taken/text/")]
    assert expert_steps.rows_taken(CONFIG, counted) == {"text": sum(taken), "image": 2 * 2 * format_tokens(1)}
    assert counted["blocks.1.experts.text.3"].histogram.sum() == format_tokens(0)
    assert not counted["blocks.1.experts.image.2"].histogram.any()  # causal already: no threshold


def test_thresholds_are_for_experts_that_choose(counted: dict[str, RouterCounts]) -> None:
    found, asked = next_thresholds({}, {}, counted, expert_steps.wanted(CONFIG))
    assert set(asked.values()) == {0.25}
    assert list(found) == [f"blocks.{layer}.experts.text.{e}" for layer in range(2) for e in range(4)]
    for name, threshold in found.items():
        assert threshold < 0, name  # of a log probability


def test_a_row_has_load_and_drops() -> None:
    window = {f"experts/taken/image/{layer}/{e}": 10.0 for layer in range(2) for e in range(3)}
    window |= {f"experts/taken/text/{layer}/{e}": float(e) for layer in range(2) for e in range(4)}
    for tower in ("text", "image"):
        window |= {f"experts/tokens/{tower}/{layer}": 20.0 for layer in range(2)}
        window |= {f"experts/dropped/{tower}/{layer}": 4.0 + layer for layer in range(2)}
        window |= {f"experts/router_z/{tower}/{layer}": 10.0 + 2 * layer for layer in range(2)}
    row = expert_steps.row(CONFIG, window)
    assert row == pytest.approx(
        {
            "experts/load_max_over_mean/text": 2.0,
            "experts/drop_frac/text": 4.5 / 20,
            "experts/load_max_over_mean/image": 1.0,
            "experts/drop_frac/image": 4.5 / 20,
            "experts/router_z/image": 11 / 20,  # that of text has no weight
        }
    )
    nothing = dict.fromkeys(window, 0.0)
    assert expert_steps.row(CONFIG, nothing) == {}
