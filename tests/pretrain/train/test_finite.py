"""A number that is none is traced to step, rank, modality and samples, alike on every rank."""

import dataclasses
import math

import pytest
import torch

from data_pipeline.stream.batch import make_batch
from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.models.config import ModelConfig
from pretrain.models.inputs import ModelInputs, build_inputs
from pretrain.train.finite import NonFiniteError, require_finite
from tests.pretrain.tiny_data import VOCABULARY

CONFIG = ModelConfig(
    num_layers=1,
    d_model=8,
    num_heads=1,
    context_tokens=4,
    vocab_tokens=VOCABULARY.size,
    towers=dict.fromkeys(VOCABULARY.modalities, "all"),
)


def _inputs(*names: str) -> ModelInputs:
    ids = torch.tensor([1, 8, 2]).numpy()
    batch = make_batch([[ids]], sequence_tokens=4, vocabulary=VOCABULARY, samples=[names])
    return build_inputs(batch, CONFIG)


def _result(local: list[list[float]], total: list[float], **changes: object) -> StepResult:
    result = StepResult(total, 6.0, 1.0, {"text": 1.0, "image": 1.0}, 1e-3, local)
    return dataclasses.replace(result, **changes)


def _message(
    rank_local: list[list[list[float]]], total: list[float], changes: dict[str, object]
) -> str | None:
    w = world.start(ParallelConfig())
    result = _result(rank_local[w.rank], total, **changes)
    try:
        inputs = [_inputs(f"tokens-00000.tar/r{w.rank}m{n}") for n in range(2)]
        require_finite(result, inputs, VOCABULARY.modalities, step=12, world=w)
    except NonFiniteError as error:
        return str(error)
    return None


GOOD = [[1.0, 2.0, 3.0, 1.0, 1.0, 1.0]] * 2


def test_the_rank_the_modality_and_the_samples_are_named_on_every_rank() -> None:
    bad = [GOOD[0], [1.0, math.nan, math.inf, 1.0, 1.0, 1.0]]
    total = [4.0, math.nan, math.inf, 4.0, 4.0, 4.0]
    changes = {"grad_norm": math.inf, "grad_norm_by_group": {"text": math.nan, "image": math.nan}}
    first, second = run_on_ranks(_message, 2, [GOOD, bad], total, changes)
    assert first == second
    assert "step 12 is not finite" in first
    assert "rank 1, micro-batch 1: image loss nan, speech loss inf; samples tokens-00000.tar/r1m1" in first
    assert "rank 0" not in first and "micro-batch 0" not in first and "text loss" not in first
    assert "Nothing was saved" in first


def test_a_gradient_alone_names_its_tower_and_all_samples() -> None:
    changes = {"grad_norm": math.inf, "grad_norm_by_group": {"text": 1.0, "image": math.nan}}
    first, second = run_on_ranks(_message, 2, [GOOD, GOOD], [4.0] * 6, changes)
    assert first == second
    assert "the gradient of image is not" in first
    for name in ("r0m0", "r0m1", "r1m0", "r1m1"):
        assert f"tokens-00000.tar/{name}" in first


def test_a_stage_without_losses_leaves_the_word_to_the_last() -> None:
    bad = [[1.0, math.nan, *GOOD[0][2:]]] * 2
    first, second = run_on_ranks(_message, 2, [[], bad], [math.nan] * 6, {})
    assert first == second
    assert "rank 1, micro-batch 0: image loss nan" in first and "rank 0" not in first


def test_a_finite_step_passes() -> None:
    assert run_on_ranks(_message, 2, [GOOD, GOOD], [4.0] * 6, {}) == [None, None]


def _message_of_many_samples() -> str:
    bad = [math.nan, *GOOD[0][1:]]
    inputs = [_inputs(*(f"tokens-00000.tar/{n}" for n in range(20)))]
    with pytest.raises(NonFiniteError) as error:
        w = world.start(ParallelConfig())
        require_finite(_result([bad], bad), inputs, VOCABULARY.modalities, step=1, world=w)
    return str(error.value)


def test_a_long_list_of_samples_is_cut() -> None:
    (message,) = run_on_ranks(_message_of_many_samples, 1)
    assert "tokens-00000.tar/7 and 12 more" in message and "tokens-00000.tar/8" not in message
