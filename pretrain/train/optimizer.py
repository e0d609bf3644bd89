"""Groups of parameters with one learning rate, and the learning-rate factor of a step."""

import math
from collections.abc import Iterable

from torch import nn

from parallel.engine import ParameterGroup
from parallel.logical import logical_of
from pretrain.config import OptimizerConfig, ScheduleConfig
from pretrain.models.config import ModelConfig
from pretrain.parameter_settings import settings_of


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], optimizer: OptimizerConfig, model: ModelConfig
) -> list[ParameterGroup]:
    """Per tower a group of matrices and one of what is never decayed (norms and routers), in order of
    appearance, and more where optimizer.groups tells parameters apart. Parameters that tensor-parallel ranks
    cut and those that each holds whole are in different groups.

    Frozen parameters are set to need no gradient and are in no group; all others are set to need one.
    """
    groups: dict[str, ParameterGroup] = {}
    for name, parameter in named_parameters:
        logical = logical_of(parameter)
        own = settings_of(name.removeprefix("decoder."), logical.shape, optimizer, model)
        parameter.requires_grad_(own is not None)
        if own is None:
            continue
        share = "cut" if logical.dim is not None else "whole"
        group = groups.setdefault(
            f"{own.tower}/{own.kind}/{share}",
            ParameterGroup(
                name=f"{own.tower}/{own.kind}/{share}",
                tower=own.tower,
                params=[],
                lr_scale=own.lr_scale,
                weight_decay=own.weight_decay,
            ),
        )
        group["params"].append(parameter)
        if own.pieces is not None:
            group.setdefault("pieces", []).append(own.pieces)
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
