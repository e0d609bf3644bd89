"""An update may be refused once the gradient is known: no parameter and no optimizer state changes then."""

from collections.abc import Callable
from typing import Any

import torch


class Refusal:
    """Asks whether a step is refused where the optimizer takes the gradient: `before_update` is its pre-hook,
    after that of GradientNorm.

    By then the gradient is summed over all ranks and its norm is known: at stage 0 GradientNorm has made it,
    in stages 1-3 DeepSpeed has, before it calls the optimizer for any group. A refused gradient is dropped,
    and torch's optimizers pass over parameters without one, with their states and weight decay. Where the
    gradient is not finite DeepSpeed does not call the optimizer, and nobody is asked.
    """

    def __init__(self) -> None:
        self._ask: Callable[[], bool] | None = None
        self.refused = False
        """Whether the step that was made since `begin` was refused."""

    def begin(self, ask: Callable[[], bool] | None) -> None:
        """Before a step. `ask`: whether it is refused; called once, on all ranks. None: it is not."""
        self._ask, self.refused = ask, False

    def before_update(self, optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        """Drop the gradients of the optimizer's groups if the step is refused: of all in one call, or of one
        group after another."""
        if self._ask is not None:
            self.refused, self._ask = self._ask(), None
        if self.refused:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None
