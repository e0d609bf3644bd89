"""The exponential moving average of weights (EMA), as one more state of any optimizer.

Engines shard it, checkpoints save it and plans count it as they do the other states. Imports torch once an
optimizer is built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from parallel.optimizer import OptimizerSpec

if TYPE_CHECKING:
    import torch

    from parallel.world import World

EMA = "ema"
"""The key of the average among the states of a parameter."""


def with_average(spec: OptimizerSpec, decay: float) -> OptimizerSpec:
    """`spec` with an average that each update moves: average <- decay x average + (1 - decay) x weights.

    It begins as the weights before the first update, and follows fp32 master weights. A parameter that an
    update passes over, as all are in a refused step, keeps its average; a frozen one has none.
    """

    def build(groups: Sequence[Mapping[str, Any]], world: "World | None" = None) -> "torch.optim.Optimizer":
        optimizer = spec.build(groups, world)
        _follow(optimizer, decay)
        return optimizer

    def new_state(parameter: "torch.Tensor", group: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
        import torch

        return {**spec.new_state(parameter, group), EMA: torch.zeros_like(parameter, requires_grad=False)}

    return replace(
        spec,
        name=f"{spec.name}+ema",
        states=(*spec.states, EMA),
        matrix_states=(*spec.matrix_states, EMA) if spec.matrix_states else (),
        build=build,
        new_state=new_state,
    )


def _follow(optimizer: "torch.optim.Optimizer", decay: float) -> None:
    """Let averages follow the optimizer's steps."""
    first: dict[torch.Tensor, torch.Tensor] = {}

    def keep_first(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        """Optimizers take a state that is not empty for one that they have made, so the average waits."""
        for parameter in _with_gradient(optimizer):
            if EMA not in optimizer.state.get(parameter, {}):
                first[parameter] = parameter.detach().clone()

    def move(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        for parameter in _with_gradient(optimizer):
            state = optimizer.state[parameter]
            if EMA not in state:
                state[EMA] = first.pop(parameter)
            state[EMA].lerp_(parameter.detach(), 1 - decay)

    optimizer.register_step_pre_hook(keep_first)
    optimizer.register_step_post_hook(move)


def _with_gradient(optimizer: "torch.optim.Optimizer") -> "list[torch.Tensor]":
    """The parameters that an update is for."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
