"""The decoder, dense and with three towers, under ZeRO 0-3 on two ranks: the one process, step for step."""

from typing import Literal

import pytest

from parallel import world
from parallel.engine import ParameterGroup, StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.config import OptimizerConfig
from pretrain.models.decoder import Decoder
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.models.pretraining import Pretraining
from pretrain.train.optimizer import parameter_groups
from tests.numerics.plain_loop import MAX_GRAD_NORM, OPTIMIZER, assert_same, learning_rate_at, plain_steps
from tests.pretrain.models.random_batch import DENSE, MOT, random_batch, tiny_config

Towers = Literal["dense", "mot"]
STEPS = 5
ABSENT = ("nowhere", "first rank", "everywhere")
"""Where speech is missing from the batches; "first rank" of two, which takes micro-batches 0 and 1 of 4."""


def _module(towers: Towers, *, checkpointing: bool = False) -> Pretraining:
    config = tiny_config(DENSE if towers == "dense" else MOT, z_loss=1e-3)
    return Pretraining(Decoder(config, seed=5, activation_checkpointing=checkpointing))


def _micro_batches(module: Pretraining, step: int, absent: str) -> list[ModelInputs]:
    """Four of one sequence, of different weights."""
    config = module.decoder.config
    batches = []
    for number in range(4):
        without = absent == "everywhere" or (absent == "first rank" and number < 2)
        batch = random_batch(
            config,
            sequences=1,
            seed=10 * step + number,
            present=(0, 1) if without else (0, 1, 2),
            padding_tokens=2 * number,
        )
        batches.append(build_inputs(batch, config))
    return batches


def _groups(module: Pretraining) -> list[ParameterGroup]:
    return parameter_groups(module.named_parameters(), OptimizerConfig(learning_rate=1.0, weight_decay=0.1))


def _plain(towers: Towers, absent: str) -> list[StepResult]:
    module = _module(towers)
    return plain_steps(module, _groups(module), lambda step: _micro_batches(module, step, absent), STEPS)


def _train(stage: Literal[0, 1, 2, 3], towers: Towers, checkpointing: bool) -> dict[str, list[StepResult]]:
    w = world.start(ParallelConfig())
    results = {}
    for absent in ABSENT:
        module = _module(towers, checkpointing=checkpointing)
        engine = ZeroEngine(
            module,
            _groups(module),
            w,
            optimizer=OPTIMIZER,
            max_grad_norm=MAX_GRAD_NORM,
            learning_rate_at=learning_rate_at,
            zero_stage=stage,
            accumulation_steps=4 // w.dp_size,
            persistent_elements=0,
        )
        mine = slice(2 * w.dp_rank, 2 * w.dp_rank + 2) if w.dp_size == 2 else slice(None)
        results[absent] = [
            engine.train_step(_micro_batches(module, step, absent)[mine], step) for step in range(STEPS)
        ]
    return results


@pytest.mark.parametrize("towers", ["dense", "mot"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one_process(stage: Literal[0, 1, 2, 3], towers: Towers) -> None:
    # Activation checkpointing where it meets the hooks of ZeRO-3, and at one other stage.
    ranks = run_on_ranks(_train, 2, stage, towers, stage in (1, 3), timeout_s=180)
    assert ranks[0] == ranks[1]
    for absent in ABSENT:
        assert_same(ranks[0][absent], _plain(towers, absent), rtol=1e-5)
    if towers == "mot":
        assert all(result.grad_norm_by_group["speech"] == 0 for result in ranks[0]["everywhere"])
        assert any(result.grad_norm_by_group["speech"] > 0 for result in ranks[0]["first rank"])
