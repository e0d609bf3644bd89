"""Parameter groups per tower, and the learning-rate factor of a step."""

import math
from collections.abc import Iterable

from torch import nn

from parallel.engine import ParameterGroup
from parallel.logical import logical_of
from pretrain.config import OptimizerConfig, ScheduleConfig, TowerOptimizerConfig
from pretrain.models.logical_weights import is_router


def tower_of(parameter_name: str) -> str:
    """A parameter's name ends with its tower, or "shared": blocks.0.attention.qkv.weight.image."""
    return parameter_name.rpartition(".")[2]


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
) -> list[ParameterGroup]:
    """Per tower a group of matrices and one of what is never decayed (norms and routers), in order of
    appearance. Parameters that tensor-parallel ranks cut and those that each holds whole are in different
    groups.

    The parameters of a frozen tower are set to need no gradient and are in no group; those of all others are
    set to need one.
    """
    groups: dict[str, ParameterGroup] = {}
    as_all_others = TowerOptimizerConfig.model_validate({})
    for name, parameter in named_parameters:
        tower = tower_of(name)
        own = config.towers.get(tower, as_all_others)
        parameter.requires_grad_(not own.frozen)
        if own.frozen:
            continue
        kind = "decay" if parameter.ndim > 1 and not is_router(name) else "no_decay"
        share = "cut" if logical_of(parameter).dim is not None else "whole"
        decay = config.weight_decay if own.weight_decay is None else own.weight_decay
        group = groups.setdefault(
            f"{tower}/{kind}/{share}",
            ParameterGroup(
                name=f"{tower}/{kind}/{share}",
                tower=tower,
                params=[],
                lr_scale=own.lr_scale,
                weight_decay=decay if kind == "decay" else 0.0,
            ),
        )
        group["params"].append(parameter)
    return list(groups.values())


def schedule_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Factor on the learning rate for the step that `step` others came before, of `num_steps`.

    Warm-up is linear and ends at 1 with its last step; the first step is 1 / warmup_steps, not 0. From there
    cosine, linear and exponential fall to min_factor at the last step; wsd stays at 1 and falls linearly to
    min_factor over the last decay_frac of the steps; constant stays.
    """
    assert 0 <= step < num_steps, (step, num_steps)
    peak = max(config.warmup_steps - 1, 0)
    last = num_steps - 1
    warm = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    if config.kind == "constant" or last == 0:
        return warm
    if config.kind != "wsd":
        if step <= peak:
            return warm
        progress = (step - peak) / (last - peak)
        if config.kind == "exponential":
            return config.min_factor**progress
        left = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.min_factor + (1 - config.min_factor) * left
    decay_steps = max(1, round(config.decay_frac * num_steps))
    left = min((last - step) / decay_steps, 1.0)
    # min: where the decay begins before the warm-up ends, the factor is never above either.
    return min(warm, config.min_factor + (1 - config.min_factor) * left)
