"""The norm of a step's gradient, global and by tower, is the same however ranks share the parameters."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from parallel.engine import ParameterGroup
from parallel.logical import logical_of
from parallel.precision import at_least_fp32
from parallel.world import World


@dataclass(frozen=True)
class Norms:
    """Before clipping. Of a gradient that is not finite `total` is inf and those of towers are nan."""

    total: float
    by_tower: dict[str, float]


class GradientNorm:
    """Looks at gradients where the optimizer takes them: `before_update` is its pre-hook.

    What a rank holds there, of one group, and hence who counts in the sum of squares over all ranks:

        dp   ZeRO 1-3: a partition of the group           all ranks
             ZeRO 0:   all of it                          the first
        tp   parameters that are cut: a part of each      all ranks
             parameters that are whole: the same on all   the first
        pp   the parameters of this stage                 all ranks

    ZeRO 1-3 has clipped by then, so their norms are scaled to what DeepSpeed reports. At stage 0 it neither
    clips nor reports: that is done here.
    """

    def __init__(
        self, groups: Sequence[ParameterGroup], world: World, *, zero_stage: int, max_grad_norm: float
    ) -> None:
        self.world, self.zero_stage, self.max_grad_norm = world, zero_stage, max_grad_norm
        first = world.dp_rank == 0
        self._counts = {
            group["name"]: (zero_stage > 0 or first) and (_is_cut(group) or world.tp_rank == 0)
            for group in groups
        }
        self._tower_of = {group["name"]: group["tower"] for group in groups}
        mine = list(self._tower_of.values())
        self.towers = tuple(dict.fromkeys(tower for stage in world.gather(mine) for tower in stage))
        """Of all stages, in the order of the first that has them."""
        self._squares: dict[str, torch.Tensor] = {}
        self._whole: Norms | None = None

    def begin(self) -> None:
        """Before the step whose norms are wanted."""
        self._squares, self._whole = {}, None

    def before_update(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Sum the squares of groups: of all in one call, or at stage 3 of one after another."""
        for group in optimizer.param_groups:
            grads = [at_least_fp32(p.grad) for p in group["params"] if p.grad is not None]
            if grads:
                squares = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).square().sum()
                self._squares[group["name"]] = self._squares.get(group["name"], 0.0) + squares.double()
        if self.zero_stage == 0:
            self._whole = self._sum()
            _clip(optimizer, self._whole.total, self.max_grad_norm)

    def before_clipping(self, reported: float | None) -> float:
        """Return the global norm of the gradient that is about to be applied. `reported`: as in `norms`."""
        return float(reported or 0.0) if self._whole is None else self._whole.total

    def norms(self, reported: float | None) -> Norms:
        """Of the step that was made since `begin`. `reported`: DeepSpeed's global norm; not used at stage 0.

        All ranks call it. Asserts that DeepSpeed clipped by the norm of the gradient that it applied: it
        counts a part of a parameter as such by an attribute (runtime/utils.py, is_model_parallel_parameter).
        """
        if self._whole is not None:
            return self._whole
        clipped = self._sum()
        if not math.isfinite(clipped.total):
            return clipped
        total = float(reported or 0.0)
        expected = min(total, self.max_grad_norm) if self.max_grad_norm > 0 else total
        # Their rounding and the 1e-6 that DeepSpeed adds before it divides.
        assert math.isclose(clipped.total, expected, rel_tol=1e-3, abs_tol=1e-6), (
            f"DeepSpeed reports a gradient norm of {total}, clipped at {self.max_grad_norm}, but that of the "
            f"gradient it applied is {clipped.total}: is a tensor-parallel parameter not marked as such?"
        )
        scale = total / clipped.total if clipped.total > 0 else 1.0
        return Norms(total, {tower: norm * scale for tower, norm in clipped.by_tower.items()})

    def _sum(self) -> Norms:
        """Over all ranks. DeepSpeed makes no update of a gradient that is not finite, and then the hook does
        not run on any rank."""
        values = torch.stack(list(self._squares.values())).tolist() if self._squares else []  # one transfer
        of_group = dict(zip(self._squares, values, strict=True))
        squares = dict.fromkeys(self.towers, 0.0)
        for name, tower in self._tower_of.items():
            if self._counts[name]:
                squares[tower] += of_group.get(name, math.nan)
        summed = self.world.sum_over_all(list(squares.values()))
        if not math.isfinite(sum(summed)):
            return Norms(math.inf, dict.fromkeys(self.towers, math.nan))
        by_tower = dict(zip(self.towers, map(math.sqrt, summed), strict=True))
        return Norms(math.sqrt(sum(summed)), by_tower)


def _clip(optimizer: torch.optim.Optimizer, norm: float, max_grad_norm: float) -> None:
    """Scale the whole gradient down to `max_grad_norm`, or drop it where it is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    for parameter in parameters:
        if not math.isfinite(norm):
            parameter.grad = None  # torch's optimizers pass such parameters over
        elif 0 < max_grad_norm < norm:
            parameter.grad.mul_(max_grad_norm / (norm + 1e-6))


def _is_cut(group: Mapping[str, Any]) -> bool:
    """Whether tensor-parallel ranks hold parts of the group's parameters, or the same of each."""
    cut = {logical_of(parameter).dim is not None for parameter in group["params"]}
    assert len(cut) == 1, f"group {group['name']} holds parameters that are cut and others that are whole"
    return cut.pop()
