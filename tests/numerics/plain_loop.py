"""A training step as its definition: one process, plain torch, the whole objective over the whole weight."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from parallel.adamw import adamw
from parallel.engine import ParameterGroup, StepResult

_BETA1, _BETA2, EPS = 0.9, 0.95, 1e-4
"""eps is well above what rounding makes of a gradient that is 0. At 1e-8 Adam moves such weights by the whole
learning rate, one way or the other: tensor-parallel ranks then came 2.6e-4 from one process in the norm of a
tower (MKL's COMPATIBLE path), and come 4e-6 from it with this eps."""
OPTIMIZER = adamw(beta1=_BETA1, beta2=_BETA2, eps=EPS)
MAX_GRAD_NORM = 0.5


def learning_rate_at(step: int) -> float:
    """Small enough that a difference of rounding does not grow: at 1e-2 the tiny decoders of these tests make
    1e-7 of a gradient into 6e-5 of the norm seven steps later, at 3e-3 into less than 1e-5."""
    return 3e-3 / (1 + step)


def _adamw(groups: Sequence[Mapping[str, Any]]) -> torch.optim.Optimizer:
    """Not fused, unlike the engine's."""
    return torch.optim.AdamW([dict(group) for group in groups], betas=(_BETA1, _BETA2), eps=EPS)


def plain_steps(
    module: torch.nn.Module,
    groups: Sequence[ParameterGroup],
    micro_batches_of: Callable[[int], Sequence[Any]],
    num_steps: int,
    learning_rate_at: Callable[[int], float] = learning_rate_at,
    build: Callable[..., torch.optim.Optimizer] = _adamw,
) -> list[StepResult]:
    """What an engine with the optimizer of `build` must return for the same steps, whatever its ranks."""
    optimizer = build([dict(group, lr=0.0) for group in groups])
    results = []
    for step in range(num_steps):
        batches = micro_batches_of(step)
        weight = sum(batch.weight for batch in batches)
        optimizer.zero_grad()
        stats: Any = 0.0
        total: Any = None
        for batch in batches:
            objective, part, report = module(batch)
            total = report if total is None else total + report
            (objective / weight).backward()
            stats = stats + part.double()
        squares: dict[str, float] = {}
        for group in groups:
            for parameter in group["params"]:
                assert parameter.grad is not None
                square = float(parameter.grad.double().square().sum())
                squares[group["tower"]] = squares.get(group["tower"], 0.0) + square
        torch.nn.utils.clip_grad_norm_(module.parameters(), MAX_GRAD_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step) * group["lr_scale"]
        optimizer.step()
        results.append(
            StepResult(
                stats=stats.tolist(),
                weight=weight,
                grad_norm=math.sqrt(sum(squares.values())),
                grad_norm_by_group={tower: math.sqrt(square) for tower, square in squares.items()},
                learning_rate=learning_rate_at(step),
                report=total,
            )
        )
    return results


def assert_same(got: Sequence[StepResult], expected: Sequence[StepResult], rtol: float) -> None:
    """Losses, loss weights and norms of every step are the same to `rtol`."""
    differences = _differences(got, expected)
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] <= rtol, f"{worst} differs by {differences[worst]:.3g}, {rtol} is allowed"


def deviation(got: Sequence[StepResult], expected: Sequence[StepResult]) -> float:
    """The largest relative difference of a loss, a loss weight or a norm of any step. A negative control asks
    that it be far above the tolerance of the test whose fault it makes."""
    return max(_differences(got, expected).values())


def _differences(got: Sequence[StepResult], expected: Sequence[StepResult]) -> dict[str, float]:
    """Number -> its relative difference; inf where one of the two is no finite number."""
    assert len(got) == len(expected) > 0, f"{len(got)} steps are compared with {len(expected)}"
    found: dict[str, float] = {}
    for step, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert len(a.stats) == len(b.stats) and a.learning_rate == b.learning_rate
        assert a.grad_norm_by_group.keys() == b.grad_norm_by_group.keys()
        norms = [(a.grad_norm_by_group[tower], norm) for tower, norm in b.grad_norm_by_group.items()]
        pairs = {
            "a loss or loss weight": list(zip(a.stats, b.stats, strict=True)),
            "the loss weight of all": [(a.weight, b.weight)],
            "the gradient's norm": [(a.grad_norm, b.grad_norm)],
            "a tower's norm": norms,
        }
        for name, numbers in pairs.items():
            found[f"{name} of step {step}"] = max(_relative(x, y) for x, y in numbers)
    return found


def _relative(x: float, y: float) -> float:
    if x == y:  # of an absent modality both are 0
        return 0.0
    difference = abs(x - y) / abs(y) if y else math.inf
    return difference if math.isfinite(difference) else math.inf
