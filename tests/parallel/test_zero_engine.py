"""What the engine does beyond arithmetic: freezing, factors, gradients that are not finite, evaluation."""

import math
from dataclasses import replace
from functools import cache
from typing import Literal

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import RanksFailed, run_on_ranks
from tests.numerics.plain_loop import learning_rate_at
from tests.numerics.test_zero_equals_one_process import Stage, engine_of
from tests.numerics.toy import Toy, toy_groups, toy_step
from tests.one_world import run_cases

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
stages = pytest.mark.parametrize("stage", STAGES)
Weights = dict[str, torch.Tensor]


def _weights(module: torch.nn.Module) -> Weights:
    """Whole parameters by name, also where ZeRO-3 has partitioned them."""
    import deepspeed

    parameters = dict(module.named_parameters())
    partitioned = [p for p in parameters.values() if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned):
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def _one_step(
    w: world.World, stage: Stage, factors: dict[str, float] | None, frozen: str | None
) -> tuple[Weights, Weights, StepResult]:
    module = Toy()
    before = _weights(module)
    engine = engine_of(module, w, stage, groups=toy_groups(module, factors=factors, frozen=frozen))
    result = engine.train_step(toy_step(0, dp_size=w.dp_size)[w.dp_rank], 0)
    return before, _weights(module), result


KINDS: dict[str, tuple[dict[str, float] | None, str | None]] = {
    "frozen": (None, "image"),
    "factor": ({"image": 0.25}, None),
    "plain": (None, None),
}
"""Factors of towers, and the tower that is frozen."""


@cache
def _all_steps() -> dict[tuple[Stage, str], tuple[Weights, Weights, StepResult]]:
    """(stage, name of KINDS) -> what the first rank finds."""
    cases = {(stage, name): (stage, *kind) for stage in STAGES for name, kind in KINDS.items()}
    found = run_cases(_one_step, 2, list(cases.values()))
    return {case: ranks[0] for case, ranks in zip(cases, found, strict=True)}


@stages
def test_a_frozen_tower_does_not_move_and_the_others_do(stage: Stage) -> None:
    before, after, result = _all_steps()[stage, "frozen"]
    for name in before:
        assert torch.equal(before[name], after[name]) == ("image" in name), name
    assert set(result.grad_norm_by_group) == {"shared", "text", "speech"}


@stages
def test_a_tower_moves_by_its_factor(stage: Stage) -> None:
    before, after, _ = _all_steps()[stage, "factor"]
    _, plain, _ = _all_steps()[stage, "plain"]
    for name in before:
        factor = 0.25 if "image" in name else 1.0
        moved, expected = after[name] - before[name], factor * (plain[name] - before[name])
        # Differences of fp32 numbers near 1 that are 1e-2 apart: 1e-5 relative measured.
        torch.testing.assert_close(moved, expected, rtol=1e-4, atol=1e-7)
    assert not torch.equal(after["hidden.image.weight"], before["hidden.image.weight"])


def _broken_step(
    w: world.World, stage: Stage, precision: Literal["fp32", "bf16"]
) -> tuple[Weights, Weights, StepResult]:
    module = Toy()
    engine = engine_of(module, w, stage, precision=precision)
    engine.train_step(toy_step(0, dp_size=w.dp_size)[w.dp_rank], 0)
    before = _weights(module)
    batches = toy_step(1, dp_size=w.dp_size)[w.dp_rank]
    if w.rank == 1:
        batches[0] = replace(batches[0], inputs=batches[0].inputs * math.nan)
    result = engine.train_step(batches, 1)
    return before, _weights(module), result


ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@cache
def _all_broken_steps() -> list[list[tuple[Weights, Weights, StepResult]]]:
    return run_cases(_broken_step, 2, ENGINES)


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_gradient_that_is_not_finite_updates_nothing_and_is_reported(stage: Stage, precision: str) -> None:
    for before, after, result in _all_broken_steps()[ENGINES.index((stage, precision))]:
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert result.grad_norm == math.inf
        assert all(math.isnan(norm) for norm in result.grad_norm_by_group.values())


def _evaluate(w: world.World, stage: Stage) -> tuple[tuple[list[float], int], Weights, Weights, StepResult]:
    module = Toy()
    engine = engine_of(module, w, stage)
    batches = toy_step(0, dp_size=w.dp_size)[w.dp_rank]
    before = _weights(module)
    evaluated = engine.eval_step(batches)
    after = _weights(module)
    result = engine.train_step(batches, 3)
    return evaluated, before, after, result


@cache
def _all_evaluated() -> list[list[tuple[tuple[list[float], int], Weights, Weights, StepResult]]]:
    return run_cases(_evaluate, 2, [(stage,) for stage in STAGES])


@stages
def test_evaluation_sums_over_ranks_and_changes_nothing(stage: Stage) -> None:
    for rank, (evaluated, before, after, result) in enumerate(_all_evaluated()[stage]):
        assert all(torch.equal(before[name], after[name]) for name in before)
        rows = sum(len(batch.targets) for batch in toy_step(0, dp_size=2)[rank])  # of this rank alone
        assert evaluated == (result.stats, result.report) and result.report == rows
        assert result.learning_rate == learning_rate_at(3)


def _evaluate_unequally() -> None:
    w = world.start(ParallelConfig())
    engine_of(Toy(), w, 3).eval_step(toy_step(0, dp_size=2)[w.dp_rank][: 1 + w.rank])


def test_unequal_evaluation_is_an_error_where_it_would_hang() -> None:
    with pytest.raises(RanksFailed, match=r"different numbers of micro-batches to an evaluation: \[1, 2\]"):
        run_on_ranks(_evaluate_unequally, 2)


def _nothing_to_learn() -> None:
    w = world.start(ParallelConfig())
    batches = [replace(b, weights=b.weights * 0) for b in toy_step(0, dp_size=1)[0]]
    engine_of(Toy(), w, 1).train_step(batches, 0)


def test_a_batch_without_weight_is_an_error() -> None:
    with pytest.raises(RanksFailed, match=r"step 1: the loss weights of the global batch sum to 0\.0"):
        run_on_ranks(_nothing_to_learn, 1)
