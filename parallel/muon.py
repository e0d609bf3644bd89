"""Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) on matrices, AdamW on all else.

Imports torch once it is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from parallel.optimizer import OptimizerSpec

if TYPE_CHECKING:
    import torch

    from parallel.world import World

_STATES, _MATRIX_STATES = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)


@dataclass(frozen=True)
class MuonSettings:
    """The settings that all matrices share, as of torch.optim.Muon."""

    momentum: float
    nesterov: bool
    ns_steps: int
    """Iterations of Newton-Schulz, each of which brings the singular values of an update nearer to 1."""
    eps: float
    """The least norm that an update is divided by before the iterations."""
    adjust_lr: Literal["match_rms_adamw", "original"]
    """Factor on the rate of an [m, n] matrix: 0.2 sqrt(max(m, n)) or sqrt(max(1, m / n))."""


def muon(settings: MuonSettings, *, beta1: float, beta2: float, eps: float) -> OptimizerSpec:
    """Muon for groups that have `pieces`, AdamW for the others (see ParameterGroup)."""

    def build(groups: Sequence[Mapping[str, Any]], world: "World | None" = None) -> "torch.optim.Optimizer":
        from parallel.muon_steps import MuonWithAdamW

        return MuonWithAdamW(groups, settings, betas=(beta1, beta2), eps=eps, world=world)

    return OptimizerSpec(
        "muon",
        _STATES,
        ("step",),
        build,
        _new_state,
        matrix_states=_MATRIX_STATES,
    )


def _new_state(parameter: "torch.Tensor", group: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    import torch

    names = _MATRIX_STATES if "pieces" in group else _STATES
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        **{name: torch.zeros_like(parameter, requires_grad=False) for name in names},
    }
