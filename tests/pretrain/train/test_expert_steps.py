"""What forward passes count, and what is made of it."""

import pytest

from pretrain.metrics import RouterSums
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.models.router_report import RouterReport, no_counts
from pretrain.train import expert_steps
from pretrain.train.thresholds import next_thresholds
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
def report() -> RouterReport:
    """The report of two passes."""
    module, total = Pretraining(Decoder(CONFIG)), no_counts(CONFIG)
    for seed in (1, 2):
        _, _, of_pass = module(build_inputs(random_batch(CONFIG, sequences=4, seed=seed), CONFIG))
        total = total + of_pass.on_host()
    return total


def tokens_of(tower: int) -> int:
    inputs = [build_inputs(random_batch(CONFIG, sequences=4, seed=seed), CONFIG) for seed in (1, 2)]
    return sum(sum(each.routing.tokens[tower].per_sequence) for each in inputs)


def test_every_router_and_expert_counts_under_its_name(report: RouterReport) -> None:
    sums = expert_steps.router_sums(CONFIG, report)
    assert len(sums) == 2 * (1 + 4 + 1 + 3)
    for layer in range(2):
        text, image = (sums[f"blocks.{layer}.experts.{tower}"] for tower in ("text", "image"))
        assert (text["tokens"], image["tokens"]) == (tokens_of(0), tokens_of(1))
        assert image["dropped"] == 0 < text["dropped"]
        taken = [sums[f"blocks.{layer}.experts.image.{e}"]["taken"] for e in range(3)]
        assert sum(taken) == 2 * tokens_of(1)
        assert image["router_z"] > 0 == image["load_balance"]
    taken = sum(sums[f"blocks.{layer}.experts.text.{e}"]["taken"] for layer in range(2) for e in range(4))
    assert expert_steps.rows_taken(CONFIG, report) == {"text": taken, "image": 2 * 2 * tokens_of(1)}
    histograms = expert_steps.histograms(report, CONFIG)
    assert histograms["blocks.1.experts.text.3"].sum() == tokens_of(0)
    assert not histograms["blocks.1.experts.image.2"].size  # causal already: no threshold


def test_thresholds_are_for_experts_that_choose(report: RouterReport) -> None:
    histograms = expert_steps.histograms(report, CONFIG)
    found, asked = next_thresholds({}, {}, histograms, expert_steps.share_targets(CONFIG))
    assert set(asked.values()) == {0.25}
    assert list(found) == [f"blocks.{layer}.experts.text.{e}" for layer in range(2) for e in range(4)]
    for name, threshold in found.items():
        assert threshold < 0, name  # of a log probability


def test_a_row_has_load_and_drops() -> None:
    window: RouterSums = {}
    for layer in range(2):
        for tower in ("text", "image"):
            sums = {"tokens": 20.0, "dropped": 4.0 + layer, "router_z": 10.0 + 2 * layer, "load_balance": 0.0}
            window[f"blocks.{layer}.experts.{tower}"] = sums
        window |= {f"blocks.{layer}.experts.image.{e}": {"taken": 10.0} for e in range(3)}
        window |= {f"blocks.{layer}.experts.text.{e}": {"taken": float(e)} for e in range(4)}
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
    nothing = {name: dict.fromkeys(sums, 0.0) for name, sums in window.items()}
    assert expert_steps.row(CONFIG, nothing) == {} == expert_steps.row(CONFIG, {})
