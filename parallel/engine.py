"""What the training loop asks of the thing that runs a step, whichever way its ranks are laid out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, Protocol, TypedDict

import torch

from parallel.fragments import Fragment
from parallel.optimizer import OptimizerSpec


class NothingToLearn(ValueError):
    """A step whose micro-batches have no weight on any rank: the data is not what it should be."""


class MicroBatch(Protocol):
    """A micro-batch is the input of one forward and backward pass of one rank."""

    @property
    def weight(self) -> float:
        """The weight is this micro-batch's share of the step's normaliser, for instance the sum of its loss
        weights. It is known on the host."""
        ...

    def to(self, device: torch.device) -> Any:
        """The same on the device; what the module's forward takes."""
        ...


class ParameterGroup(TypedDict):
    """Parameters with one learning rate and weight decay: all cut over tensor-parallel ranks, or all whole
    (parallel/logical.py). Groups of a tower share its `tower` name."""

    name: str
    """Unique, such as "image/decay/cut"."""
    tower: str
    params: list[torch.nn.Parameter]
    lr_scale: float
    """Times the learning rate of the step."""
    weight_decay: float
    pieces: NotRequired[list[tuple[int, ...]]]
    """Of matrices that an optimizer orthogonalises: for each parameter the numbers of rows of the whole
    matrix that it takes together. Groups of other parameters have none."""
    lr: NotRequired[float]
    """Set by the engine before every step."""


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. All but `local_stats` and `report` is equal on all ranks."""

    stats: list[float]
    """Sum of the module's stats over micro-batches and data-parallel ranks."""
    weight: float
    """The normaliser: sum of `weight` over micro-batches and data-parallel ranks."""
    grad_norm: float
    """L2 norm of the normalised gradient over all parameters, before clipping. inf where the gradient is not
    finite: then nothing was updated."""
    grad_norm_by_group: dict[str, float]
    """The same for each tower. nan where the gradient is not finite."""
    learning_rate: float
    """Before the groups' factors."""
    local_stats: list[list[float]] = field(default_factory=list, compare=False)
    """The module's stats for each micro-batch of this rank: where a number of `stats` came from. Empty on
    all pipeline stages but the last."""
    report: Any = field(default=None, compare=False)
    """The module's reports, summed over the micro-batches of this rank."""
    applied: bool = True
    """Whether the parameters were updated. False: the gradient is not finite, or the update was refused."""


Refuse = Callable[[Sequence[float], float], bool]
"""Whether a step is not to be applied, from its `stats` and `grad_norm`, which are equal on all ranks. It is
asked once the gradient is complete, before any parameter changes, and answers alike on all ranks."""


class Engine(Protocol):
    """Drives a module whose forward(micro_batch) gives (objective_sum, stats, report), none of them
    normalised. A report is any value without gradient that `+` sums over micro-batches."""

    @property
    def optimizer(self) -> OptimizerSpec:
        """What updates the parameters; names the states in `fragments` and the counters."""
        ...

    @property
    def layout(self) -> Mapping[str, Any]:
        """How its ranks are laid out. A checkpoint keeps it for the record; any layout loads it."""
        ...

    def train_step(
        self, micro_batches: Sequence[MicroBatch], step: int, refuse: Refuse | None = None
    ) -> StepResult:
        """One optimizer step. `step`: how many came before it. The gradient is that of the sum of
        objective_sum over all ranks and micro-batches, divided once by the sum of all weights. A step that
        `refuse` refuses changes no parameter and no state of the optimizer; None: no step is refused."""
        ...

    def eval_step(self, micro_batches: Sequence[MicroBatch]) -> tuple[list[float], Any]:
        """Return stats summed over micro-batches and data-parallel ranks, and reports summed over the
        micro-batches of this rank. No gradient is computed and no parameter changes. Every rank brings
        equally many micro-batches."""
        ...

    def fragments(self) -> list[Fragment]:
        """Return the fragments of parameters and optimizer state that this rank holds, as views of the live
        tensors."""
        ...

    def counters(self) -> dict[str, float] | None:
        """The optimizer's counters, equal on all ranks; None before its first update: there are no states."""
        ...

    def load(self, counters: Mapping[str, float] | None, fill: Callable[[Sequence[Fragment]], None]) -> None:
        """Set the optimizer's counters and let `fill` overwrite `fragments()`, which then have states unless
        `counters` is None. The next forward pass uses what was written. All ranks call it."""
        ...
