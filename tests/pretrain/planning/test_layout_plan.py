"""Activations, groups and traffic of a plan, against real decoders and by hand."""

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.files.toml_config import validate
from pretrain.config import RunConfig
from pretrain.models import cross_entropy
from pretrain.models.decoder import Decoder
from pretrain.models.pretraining import Pretraining
from pretrain.optimizer_config import OptimizerConfig
from pretrain.planning import layout_plan
from pretrain.train.optimizer import parameter_groups
from tests.pretrain.models.random_batch import DENSE, ELEMENTS, MOT


def run_config(model: dict[str, Any] | None = None, precision: str = "fp32", **parallel: Any) -> RunConfig:
    shape = {
        "num_layers": 3, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden": 48,
        "context_tokens": 64, "vocab_tokens": 80, "towers": MOT,
    }  # fmt: skip
    values = {
        "name": "planned", "total_tokens": 8192, "tokens_per_step": 16 * 64, "precision": precision,
        "model": shape | (model or {}), "data": {"train": [{"path": "nowhere"}]},
        "optimizer": {"learning_rate": 1e-3}, "parallel": parallel,
    }  # fmt: skip
    return validate(RunConfig, values, source="test")


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"towers": DENSE},
        {"untied": ["attention"]},
        {"untied": ["qkv", "embedding", "head", "final_norm"]},
        {"qk_norm": False},
        ELEMENTS,
        {"experts": {"image": {"num_experts": 4}}},
    ],
)
@pytest.mark.parametrize("sublayers", [range(8), range(2), range(2, 4), range(5, 8)], ids=str)
def test_groups_are_those_of_the_optimizer(model: dict[str, Any], sublayers: range) -> None:
    assert_groups(model, sublayers)


def test_groups_of_one_weight_for_embedding_and_head() -> None:
    """Of all layers, for a stage without the embedding is refused."""
    assert_groups({"tied_embeddings": True}, range(8))


@pytest.mark.parametrize("towers", [DENSE, MOT], ids=["dense", "mot"])
@pytest.mark.parametrize("sublayers", [range(8), range(2), range(1, 5), range(3, 6), range(5, 8)], ids=str)
def test_groups_with_depth_routers(towers: dict[str, str], sublayers: range) -> None:
    """Of the middle block, which is never cut."""
    table = {"schedule": "alternating", "mean_ratio": 0.9, "rule": "top_k"}
    assert_groups({"towers": towers, "depth": {"image": table, "speech": table}}, sublayers)


@pytest.mark.parametrize("sublayers", [range(8), range(2, 5)], ids=str)
def test_groups_by_pattern(sublayers: range) -> None:
    """One pattern holds a block apart, one reaches the middle of three blocks, one freezes."""
    patterns = [
        {"match": "blocks.1.*.weight.image", "lr_scale": 0.5},
        {"match": "*feed_forward*", "weight_decay": 0.0},
        {"match": "*norm.weight.text", "frozen": True},
    ]
    assert_groups({}, sublayers, {"learning_rate": 1e-3, "groups": patterns})


@pytest.mark.parametrize("sublayers", [range(8), range(3), range(3, 8)], ids=str)
def test_adapters_of_vectors_are_planned_on_the_stages_that_hold_them(sublayers: range) -> None:
    assert_groups({"vectors": {"image": {"features": 5}}}, sublayers)


def assert_groups(model: dict[str, Any], sublayers: range, optimizer: dict[str, Any] | None = None) -> None:
    config = run_config(model)
    if optimizer is not None:
        config = config.model_copy(update={"optimizer": OptimizerConfig.model_validate(optimizer)})
    module = Pretraining(Decoder(config.model, sublayers=sublayers))
    groups = parameter_groups(module.named_parameters(), config.optimizer, config.model)
    expected = {group["name"]: [p.numel() for p in group["params"]] for group in groups}
    trained, frozen = layout_plan.weights(config, sublayers, tp=1)
    assert trained == expected and list(trained) == list(expected)
    held = sum(p.numel() for p in module.parameters() if not p.requires_grad)
    assert sum(map(sum, frozen.values())) == held


def test_the_chunk_of_the_loss_is_the_one_planned_with() -> None:
    assert layout_plan.CHUNK_TOKENS == cross_entropy.CHUNK_TOKENS


def test_stages_bubble_and_activations_in_flight() -> None:
    found = layout_plan.plan(run_config(pp=3, micro_batch_sequences=2), 6)
    assert (found.dp, found.micro_batches, len(found.stages)) == (2, 4, 3)
    assert found.bubble_frac == 2 / 6
    flops = [stage.flops for stage in found.stages]
    assert found.imbalance == pytest.approx(max(flops) / (sum(flops) / 3))
    assert [stage.sublayers for stage in found.stages] == [range(3), range(3, 5), range(5, 8)]
    first, second = (stage.activations for stage in found.stages[:2])
    assert first / 3 == second / 2  # both hold one block; the embedding keeps nothing


def sent(axis: str, gpus: int = 4, change: Callable[[RunConfig], RunConfig] | None = None, **p: Any) -> int:
    config = run_config(micro_batch_sequences=2, **p)
    return layout_plan.plan(change(config) if change else config, gpus).sent[axis]


def test_bytes_sent_by_hand() -> None:
    elements = sum(map(sum, layout_plan.weights(run_config(), range(8), tp=1)[0].values()))
    assert sent("tp") == 0 and sent("pp") == 0
    # 16 sequences a step are 2 micro-batches of 2 sequences on each of 4 ranks.
    assert sent("dp", zero_stage=0) == 3 / 4 * 8 * elements
    assert sent("dp", zero_stage=1) == 3 / 4 * 12 * elements
    assert sent("dp", zero_stage=2) == 3 / 4 * 20 * elements
    assert sent("dp", zero_stage=3) == 3 / 4 * 2 * 12 * elements
    # 4 micro-batches of 128 tokens x 32 features in fp32, there and, on a stage in between, back.
    assert sent("pp", pp=2) == 4 * 128 * 32 * 4
    assert sent("pp", gpus=6, pp=3) == 2 * 4 * 128 * 32 * 4
    # 3 blocks of 10 collectives each, 4 for embedding and head, half of it sent; numbers of the loss.
    hidden, statistics = 128 * 32 * 4, 128 // 2 * 3 * 4
    assert sent("tp", gpus=2, tp=2) == 8 * (34 * hidden // 2 + statistics)
    assert sent("tp", gpus=2, tp=2, sequence_parallel=False) == 8 * (28 * hidden // 2 + statistics)
    assert sent("tp", gpus=2, tp=2, activation_checkpointing=True) == 8 * (46 * hidden // 2 + statistics)


def test_a_frozen_tower_costs_its_parameters_only() -> None:
    config = run_config()
    frozen = config.model_copy(
        update={"optimizer": config.optimizer.model_validate(
            {"learning_rate": 1e-3, "towers": {"speech": {"frozen": True}}}
        )}
    )  # fmt: skip
    (free,), (held,) = (layout_plan.plan(each, 1).stages for each in (config, frozen))
    assert held.towers["speech"].gradients == held.towers["speech"].optimizer == 0
    assert held.towers["text"] == free.towers["text"]


def test_what_fits_comes_first_by_seconds_then_the_rest_by_bytes() -> None:
    config = run_config()
    everything = layout_plan.ranked(config, 4)
    assert [found.seconds for found in everything] == sorted(found.seconds for found in everything)
    sizes = sorted(found.peak_bytes for found in everything)
    limit = sizes[len(sizes) // 2]
    some = layout_plan.ranked(config, 4, limit)
    fitting = [found for found in some if found.peak_bytes <= limit]
    assert some[: len(fitting)] == fitting
    assert [found.seconds for found in fitting] == sorted(found.seconds for found in fitting)
    rest = [found.peak_bytes for found in some[len(fitting) :]]
    assert rest == sorted(rest) and len(rest) > 0
