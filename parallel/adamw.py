"""AdamW (Loshchilov, Hutter, arXiv 1711.05101), in torch's fused kernel. Imports torch once it is built."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from parallel.optimizer import OptimizerSpec

if TYPE_CHECKING:
    import torch

    from parallel.world import World


def adamw(*, beta1: float, beta2: float, eps: float) -> OptimizerSpec:
    """AdamW whose groups share these numbers; learning rate and weight decay are each group's own."""

    def build(groups: Sequence[Mapping[str, Any]], world: "World | None" = None) -> "torch.optim.Optimizer":
        from torch.optim import AdamW

        return AdamW([dict(group) for group in groups], betas=(beta1, beta2), eps=eps, fused=True)

    return OptimizerSpec("adamw", ("exp_avg", "exp_avg_sq"), ("step",), build, _new_state)


def _new_state(parameter: "torch.Tensor", group: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    import torch

    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
    }
