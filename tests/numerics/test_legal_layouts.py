"""The rules of parallel/layout.py against what really starts and takes a step, rules left aside."""

from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.config import RunConfig, check_run_layout
from pretrain.models.inputs import build_inputs
from pretrain.train import build
from tests.one_world import run_cases
from tests.pretrain.models.random_batch import MOT, random_batch


def run_config(model: dict[str, Any], precision: str, parallel: dict[str, Any]) -> RunConfig:
    shape = {
        "num_layers": 2, "d_model": 16, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden": 24,
        "context_tokens": 12, "vocab_tokens": 40, "towers": MOT,
    }  # fmt: skip
    context = model.get("context_tokens", 12)
    values = {
        "name": "grid", "total_tokens": 40 * context, "tokens_per_step": 4 * context, "precision": precision,
        "model": shape | model, "data": {"train": [{"path": "nowhere"}]},
        "optimizer": {"learning_rate": 1e-3}, "parallel": parallel,
    }  # fmt: skip
    return validate(RunConfig, values, source="test")


def attempt(config: RunConfig) -> str:
    """ "" after a step with a finite gradient, else what went wrong, the same on every rank."""
    try:
        return step(world.start(config.parallel), config)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def step(w: world.World, config: RunConfig) -> str:
    """The same, of ranks that have met."""
    try:
        engine = build.engine(config, w)
        sequences = config.parallel.micro_batch_sequences
        passes = config.sequences_per_step // (w.dp_size * sequences)
        batches = [
            random_batch(config.model, sequences=sequences, seed=7 * w.dp_rank + k) for k in range(passes)
        ]
        result = engine.train_step([build_inputs(batch, config.model) for batch in batches], 0)
        return "" if 0 < result.grad_norm < float("inf") else f"gradient norm {result.grad_norm}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def refused(config: RunConfig, ranks: int) -> bool:
    try:
        check_run_layout(config, ranks)
    except ConfigError:
        return True
    return False


GRID: list[tuple[int, dict[str, Any], tuple[int, ...]]] = [
    (2, {}, (0, 1, 2, 3)),
    (2, {"tp": 2}, (0, 1, 2, 3)),
    (2, {"pp": 2}, (0, 1, 2, 3)),
    (4, {"tp": 2, "pp": 2}, (1,)),
    (2, {"tp": 2, "sequence_parallel": False, "micro_batch_sequences": 4}, (1,)),
]
"""Ranks, layout and ZeRO stages."""


@pytest.mark.parametrize(("ranks", "parallel", "stages"), GRID, ids=str)
def test_what_the_rules_let_pass_trains_and_nothing_else(
    ranks: int, parallel: dict[str, Any], stages: tuple[int, ...]
) -> None:
    configs = [run_config({}, "fp32", parallel | {"zero_stage": stage}) for stage in stages]
    passed = [config for config in configs if not refused(config, ranks)]
    found = run_cases(step, ranks, [(config,) for config in passed], ParallelConfig(**parallel))
    assert [set(said) for said in found] == [{""}] * len(passed)
    for config in configs:
        if config not in passed:
            (said,) = set(run_on_ranks(attempt, ranks, config))
            assert said, config.parallel


REFUSED = {
    "processes that tp does not divide": (3, {}, "fp32", {"tp": 2}, "3 processes cannot be laid out"),
    "fewer heads for keys than tp": (4, {}, "fp32", {"tp": 4}, "RuntimeError"),
    "rows of the vocabulary": (2, {"vocab_tokens": 41}, "fp32", {"tp": 2}, "41 is not divisible by 2"),
    "tokens of a chunk": (2, {"context_tokens": 13}, "fp32", {"tp": 2}, "worldSize == inputShape"),
    "empty stages": (3, {"num_layers": 1}, "fp32", {"pp": 3}, "2 sublayers cannot be cut into 3 stages"),
    "ZeRO-0 in bf16": (1, {}, "bf16", {"zero_stage": 0}, "ZeRO stage 0 with bf16 trains wrongly"),
    # Would train on 3 of its 4 sequences, and say nothing: refused for that.
    "sequences left over": (1, {}, "fp32", {"micro_batch_sequences": 3}, ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_happen_without_the_rule(name: str) -> None:
    ranks, model, precision, parallel, expected = REFUSED[name]
    config = run_config(model, precision, parallel)
    assert refused(config, ranks)
    for said in run_on_ranks(attempt, ranks, config):
        assert (expected in said) if expected else not said, said
