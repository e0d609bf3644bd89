"""What the pipeline engine does beyond arithmetic: the passes of a stage, gradients that are not finite,
groups that a stage does not have, evaluation."""

import contextlib
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from parallel import world
from parallel.engine import ParameterGroup, StepResult
from parallel.layout import ParallelConfig
from parallel.pipeline_engine import PipelineEngine
from parallel.testing import RanksFailed, run_on_ranks
from tests.numerics.plain_loop import MAX_GRAD_NORM, OPTIMIZER, assert_same, learning_rate_at, plain_steps
from tests.one_world import run_cases

STAGES = 3
RTOL = {"fp32": 1e-5, "bf16": 2e-2}
"""Sums in another order: 2e-7 measured; bf16: 4e-3."""
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """inputs [6, 4], and how often it was brought to the device."""

    inputs: Tensor
    number: int
    moved: list[int]

    @property
    def weight(self) -> float:
        return 1.0 + self.number

    def to(self, device: torch.device) -> "Rows":
        self.moved.append(self.number)
        return replace(self, inputs=self.inputs.to(device))


class Stage(nn.Module):
    """tanh(linear) of tower "all" on every stage; the first scales its inputs by weights of tower "first",
    the second adds to the objective."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        self.linear = nn.Linear(4, 4)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(4) + 0.1 * stage)
            self.linear.bias.zero_()
        if stage == 0:
            self.first = nn.Parameter(torch.linspace(0.5, 1.5, 4))

    def forward(self, rows: Rows, hidden: Tensor | None) -> tuple[Tensor, Tensor | None, list[int]]:
        """Every stage looks at the micro-batch, so that one with another would be noticed."""
        if hidden is None:
            hidden = rows.inputs.to(self.first.dtype) * self.first
        hidden = torch.tanh(self.linear(hidden)) + rows.inputs.mean().to(hidden.dtype)
        if self.stage < STAGES - 1:
            own = hidden.float().square().sum() * rows.weight if self.stage == 1 else None
            return hidden, own, [self.stage]
        objective = (hidden.float() - 0.3).square().sum() * rows.weight
        stats = torch.stack([objective.detach(), objective.new_tensor(rows.weight)])
        return objective, stats, [self.stage]


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Stage(stage) for stage in range(STAGES))

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, list[int]]:
        first, middle, last = self.stages
        hidden, own, _ = middle(rows, first(rows, None)[0])
        objective, stats, report = last(rows, hidden)
        return objective + own, stats, report


def _is_before_the_last(module: nn.Module, name: str) -> bool:
    stage = module.stage if isinstance(module, Stage) else int(name.split(".")[1])
    return stage < STAGES - 1


def _groups(module: nn.Module, frozen: str | None = None) -> list[ParameterGroup]:
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in module.named_parameters():
        tower = "first" if name.endswith("first") else "all"
        if frozen == tower or (frozen == "all but the last" and _is_before_the_last(module, name)):
            parameter.requires_grad_(False)
            continue
        empty = ParameterGroup(name=tower, tower=tower, params=[], lr_scale=1.0, weight_decay=0.1)
        groups.setdefault(tower, empty)["params"].append(parameter)
    return list(groups.values())


def _micro_batches(step: int, count: int = 4) -> list[Rows]:
    generator = torch.Generator().manual_seed(step)
    moved: list[int] = []
    return [Rows(torch.randn(6, 4, generator=generator), number, moved) for number in range(count)]


def _engine(
    w: world.World,
    zero_stage: Literal[0, 1],
    precision: Literal["fp32", "bf16"] = "fp32",
    frozen: str | None = None,
) -> PipelineEngine:
    module = Stage(w.pp_rank)
    return PipelineEngine(
        module,
        _groups(module, frozen),
        w,
        optimizer=OPTIMIZER,
        max_grad_norm=MAX_GRAD_NORM,
        learning_rate_at=learning_rate_at,
        zero_stage=zero_stage,
        precision=precision,
        accumulation_steps=4,
    )


def _weights(engine: PipelineEngine) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in engine.named_parameters.items()}


def _train(
    w: world.World, zero_stage: Literal[0, 1]
) -> tuple[list[StepResult], list[list[int]], list[str], tuple[list[float], list[int]], str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        engine = _engine(w, zero_stage)
        results, moved = [], []
        for step in range(3):
            batches = _micro_batches(step)
            results.append(engine.train_step(batches, step))
            moved.append(batches[0].moved)
            # Of another number of micro-batches than a step, between steps; see below.
            evaluated = engine.eval_step(_micro_batches(step + 1, 3))
    return results, moved, list(engine.named_parameters), evaluated, printed.getvalue()


ENGINES: list[tuple[Literal[0, 1], Literal["fp32", "bf16"]]] = [(0, "fp32"), (1, "fp32"), (1, "bf16")]
"""ZeRO stage and precision."""


@cache
def _of_engines(fn: Callable[..., Any]) -> list[list[Any]]:
    """What `fn` finds of each of ENGINES, on every rank."""
    return run_cases(fn, STAGES, ENGINES, ParallelConfig(pp=STAGES))


engines = pytest.mark.parametrize("engine", range(len(ENGINES)), ids=[str(engine) for engine in ENGINES])


@cache
def _all_trained() -> list[list[Any]]:
    return run_cases(_train, STAGES, [(0,), (1,)], ParallelConfig(pp=STAGES))


@pytest.mark.parametrize("zero_stage", [0, 1])
def test_each_stage_brings_its_micro_batches_once_and_in_order(zero_stage: Literal[0, 1]) -> None:
    whole = Whole()
    expected = plain_steps(whole, _groups(whole), _micro_batches, 3)
    with torch.no_grad():
        heldout = sum(whole(batch)[1].double() for batch in _micro_batches(3, 3))
    for stage, (results, moved, names, evaluated, printed) in enumerate(_all_trained()[zero_stage]):
        assert_same(results, expected, rtol=RTOL["fp32"])
        assert moved == [[0, 1, 2, 3]] * 3
        assert names == [name for name, _ in Stage(stage).named_parameters()]
        assert evaluated[0] == pytest.approx(heldout.tolist(), rel=1e-5)  # type: ignore[union-attr]
        assert evaluated[1] == [stage] * 3
        assert printed == ""
        for result in results:
            assert result.report == [stage] * 4  # of its own passes
            parts = torch.tensor(result.local_stats).sum(0).tolist() if stage == STAGES - 1 else []
            assert parts == pytest.approx(result.stats if parts else [])


def _broken_step(
    w: world.World, zero_stage: Literal[0, 1], precision: Literal["fp32", "bf16"]
) -> tuple[Weights, Weights, StepResult, StepResult]:
    """The gradient of one stage alone is not finite in step 1."""
    engine = _engine(w, zero_stage, precision)
    engine.train_step(_micro_batches(0), 0)
    before = _weights(engine)
    if w.pp_rank == 1:
        (bias,) = (p for name, p in engine.named_parameters.items() if name == "linear.bias")
        handle = bias.register_hook(lambda grad: grad * math.inf)
    broken = engine.train_step(_micro_batches(1), 1)
    after = _weights(engine)
    if w.pp_rank == 1:
        handle.remove()
    return before, after, broken, engine.train_step(_micro_batches(2), 2)


@engines
def test_a_gradient_that_is_not_finite_on_one_stage_updates_none(engine: int) -> None:
    ranks = _of_engines(_broken_step)[engine]
    for before, after, broken, next_step in ranks:
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert broken.grad_norm == math.inf
        assert all(math.isnan(norm) for norm in broken.grad_norm_by_group.values())
        assert next_step == ranks[0][3] and math.isfinite(next_step.grad_norm)


def _train_the_first_stage(
    w: world.World, zero_stage: Literal[0, 1], precision: Literal["fp32", "bf16"]
) -> tuple[list[StepResult], Weights, Weights]:
    engine = _engine(w, zero_stage, precision, frozen="all")
    before = _weights(engine)
    results = [engine.train_step(_micro_batches(step), step) for step in range(3)]
    return results, before, _weights(engine)


@engines
def test_a_stage_with_nothing_to_train_passes_gradients_on(engine: int) -> None:
    whole = Whole()
    expected = plain_steps(whole, _groups(whole, "all"), _micro_batches, 3)
    for results, before, after in _of_engines(_train_the_first_stage)[engine]:
        assert_same(results, expected, rtol=RTOL[ENGINES[engine][1]])
        for name in before:
            assert torch.equal(before[name], after[name]) == (name != "first"), name


def _train_the_last_stage(
    w: world.World, zero_stage: Literal[0, 1], precision: Literal["fp32", "bf16"]
) -> list[StepResult]:
    engine = _engine(w, zero_stage, precision, frozen="all but the last")
    return [engine.train_step(_micro_batches(step), step) for step in range(3)]


@engines
def test_the_first_stages_may_have_nothing_to_train(engine: int) -> None:
    """What they hand on then depends on no parameter."""
    whole = Whole()
    expected = plain_steps(whole, _groups(whole, "all but the last"), _micro_batches, 3)
    for results in _of_engines(_train_the_last_stage)[engine]:
        assert_same(results, expected, rtol=RTOL[ENGINES[engine][1]])


def _another_shape() -> None:
    w = world.start(ParallelConfig(pp=STAGES))
    engine = _engine(w, 1)
    engine.train_step(_micro_batches(0), 0)
    engine.eval_step([replace(batch, inputs=batch.inputs[:2]) for batch in _micro_batches(0)])


def test_a_micro_batch_of_another_shape_is_an_error_where_it_would_hang() -> None:
    with pytest.raises(RanksFailed, match=r"torch\.Size\(\[6, 4\]\), torch\.Size\(\[2, 4\]\)"):
        run_on_ranks(_another_shape, STAGES)
