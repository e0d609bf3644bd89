"""What the engine, checkpoints and plans know of an optimizer: an OptimizerSpec. Imports no torch.

An optimizer is one file that makes its spec, such as parallel/adamw.py. All others speak of its states and
counters by the names in the spec.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

FP32_BYTES = 4


@dataclass(frozen=True)
class OptimizerSpec:
    """The spec names a torch optimizer that updates every element by its own gradient and states alone.

    ZeRO steps it on flat tensors that join many parameters, or parts of them: an optimizer that looks at the
    shape or the norm of a parameter would compute something else there.
    """

    name: str
    """Kept in checkpoints, which only an optimizer of this name reads."""
    states: tuple[str, ...]
    """Keys of torch's per-parameter state whose values are fp32 tensors of the parameter's shape."""
    counters: tuple[str, ...]
    """Keys of it whose values are scalar tensors, equal for all parameters, such as the number of updates."""
    build: "Callable[[Sequence[Mapping[str, Any]]], torch.optim.Optimizer]"
    """The optimizer of parameter groups with `params`, `lr` and `weight_decay`, and keys it must leave."""
    new_state: "Callable[[torch.Tensor], dict[str, torch.Tensor]]"
    """The state of a parameter before its first update, zeros of `states` and `counters`, typed and placed as
    the optimizer does it."""

    @property
    def state_bytes(self) -> int:
        """The bytes that `states` take for one element of a parameter."""
        return FP32_BYTES * len(self.states)
