"""ZeRO 0-3 on several ranks is the one process: same losses, same gradient norms, step for step."""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from tests.numerics.plain_loop import (
    MAX_GRAD_NORM,
    OPTIMIZER,
    assert_same,
    deviation,
    learning_rate_at,
    plain_steps,
)
from tests.numerics.toy import Toy, ToyBatch, toy_groups, toy_step
from tests.one_world import run_cases

Stage = Literal[0, 1, 2, 3]
STEPS = 4
RTOL = 2e-6
"""fp32, sums in another order: 1e-7 measured, at every stage. Without ZeRO the decoder is compared in fp64
(test_zero_decoder.py); here all stages are in fp32, as DeepSpeed keeps the weights of the others."""


def plain_torch(absent: str) -> list[StepResult]:
    module = Toy()
    return plain_steps(
        module, toy_groups(module), lambda step: toy_step(step, dp_size=1, absent=absent)[0], STEPS
    )


def engine_of(module: Toy, w: world.World, stage: Stage, **options: Any) -> ZeroEngine:
    options.setdefault("groups", toy_groups(module))
    options.setdefault("persistent_elements", 0)  # else ZeRO-3 would keep so small a module whole
    options.setdefault("optimizer", OPTIMIZER)
    return ZeroEngine(
        module,
        world=w,
        max_grad_norm=MAX_GRAD_NORM,
        learning_rate_at=learning_rate_at,
        zero_stage=stage,
        accumulation_steps=4 // w.dp_size,
        **options,
    )


def _train(w: world.World, stage: Stage, absent: str, precision: Literal["fp32", "bf16"]) -> list[StepResult]:
    engine = engine_of(Toy(), w, stage, precision=precision)
    return [
        engine.train_step(toy_step(step, dp_size=w.dp_size, absent=absent)[w.dp_rank], step)
        for step in range(STEPS)
    ]


CASES = {
    # By number of ranks: stage, where a modality is absent, precision. Two ranks in fp32 are in
    # test_zero_decoder.py.
    4: [(1, "nowhere", "fp32"), (3, "nowhere", "fp32")],
    2: [(stage, "first rank", "bf16") for stage in (1, 2, 3)],
    1: [(stage, "everywhere", "fp32") for stage in (0, 1, 2, 3)]
    + [(stage, "first rank", "bf16") for stage in (1, 2, 3)],
}


@cache
def _all_trained(ranks: int) -> list[list[list[StepResult]]]:
    return run_cases(_train, ranks, CASES[ranks])


def trained(ranks: int, *case: Any) -> list[StepResult]:
    """What all ranks find in one of CASES."""
    found = _all_trained(ranks)[CASES[ranks].index(case)]
    assert all(rank == found[0] for rank in found)
    return found[0]


@pytest.mark.parametrize("stage", [1, 3])
def test_four_ranks_equal_one_process(stage: Stage) -> None:
    assert_same(trained(4, stage, "nowhere", "fp32"), plain_torch("nowhere"), RTOL)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_equals_plain_torch(stage: Stage) -> None:
    assert_same(trained(1, stage, "everywhere", "fp32"), plain_torch("everywhere"), RTOL)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_the_same_on_one_and_two_ranks_and_close_to_fp32(stage: Stage) -> None:
    two = trained(2, stage, "first rank", "bf16")
    # Gradients are summed over ranks in fp32, so ranks add nothing to bf16's rounding: 1e-7 measured.
    assert_same(two, trained(1, stage, "first rank", "bf16"), RTOL)
    for bf16, fp32 in zip(two, plain_torch("first rank"), strict=True):
        # 8 bits of mantissa; 1.3e-3 measured on the norm, 1.1e-3 on the loss.
        assert sum(bf16.stats[:3]) == pytest.approx(sum(fp32.stats[:3]), rel=5e-3)
        assert bf16.grad_norm == pytest.approx(fp32.grad_norm, rel=5e-3)


class MeanOfMeans(Toy):
    """The usual mistake: every micro-batch divides by its own weight, and means are averaged."""

    def forward(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor, int]:
        objective, stats, rows = super().forward(batch)
        return objective / batch.weight * batch.mean_weight, stats, rows


@dataclass(frozen=True)
class MeanBatch(ToyBatch):
    mean_weight: float = 0.0

    def to(self, device: torch.device) -> "MeanBatch":
        return self


def _train_on_means() -> list[StepResult]:
    w = world.start(ParallelConfig())
    engine = engine_of(MeanOfMeans(), w, 1)
    results = []
    for step in range(STEPS):
        mean = sum(batch.weight for rank in toy_step(step, dp_size=2) for batch in rank) / 4
        batches = [
            MeanBatch(batch.inputs, batch.targets, batch.weights, batch.counts, mean)
            for batch in toy_step(step, dp_size=2)[w.dp_rank]
        ]
        results.append(engine.train_step(batches, step))
    return results


def test_a_mean_of_means_would_be_noticed() -> None:
    assert deviation(run_on_ranks(_train_on_means, 2)[0], plain_torch("nowhere")) > 100 * RTOL


def _train_alone() -> list[StepResult]:
    """Two ranks that do not reduce gradients over each other."""
    w = world.start(ParallelConfig())
    engine = engine_of(Toy(), w, 0)
    engine.deepspeed.enable_backward_allreduce = False
    return [engine.train_step(toy_step(step, dp_size=2)[w.dp_rank], step) for step in range(STEPS)]


def test_ranks_that_do_not_reduce_would_be_noticed() -> None:
    assert deviation(run_on_ranks(_train_alone, 2)[0], plain_torch("nowhere")) > 100 * RTOL
