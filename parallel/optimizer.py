"""What the engine, checkpoints and plans know of an optimizer: an OptimizerSpec. Imports no torch.

An optimizer is one file that makes its spec, such as parallel/adamw.py. All others speak of its states and
counters by the names in the spec.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from parallel.world import World

FP32_BYTES = 4


@dataclass(frozen=True)
class OptimizerSpec:
    """The spec names a torch optimizer and its states.

    ZeRO steps it on flat tensors that join many parameters, or parts of them. An optimizer that updates every
    element by its own gradient and states alone needs to know no more; one that looks at the shape or the
    norm of a parameter must find the parameter in them, as parallel/muon_steps.py does.
    """

    name: str
    """Kept in checkpoints, which only an optimizer of this name reads."""
    states: tuple[str, ...]
    """Keys of torch's per-parameter state whose values are fp32 tensors of the parameter's shape."""
    counters: tuple[str, ...]
    """Keys of it whose values are scalar tensors, equal for all parameters, such as the number of updates."""
    build: "Callable[[Sequence[Mapping[str, Any]], World | None], torch.optim.Optimizer]"
    """The optimizer of parameter groups with `params`, `lr` and `weight_decay`, and keys that it must leave,
    on the ranks of a World; None: one process."""
    new_state: "Callable[[torch.Tensor, Mapping[str, Any]], dict[str, torch.Tensor]]"
    """The state of a parameter of a group before its first update, zeros of `states` and `counters`, typed
    and placed as the optimizer does it."""
    matrix_states: tuple[str, ...] = ()
    """In place of `states` for parameters of groups with `pieces` (see ParameterGroup)."""

    def state_bytes(self, *, matrices: bool = False) -> int:
        """The bytes that states take for one element of a parameter; `matrices`: of a group with `pieces`."""
        return FP32_BYTES * len(self.matrix_states if matrices else self.states)
