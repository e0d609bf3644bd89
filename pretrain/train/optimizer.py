"""Groups of parameters with one learning rate."""

from collections.abc import Iterable

from torch import nn

from parallel.engine import ParameterGroup
from parallel.logical import logical_of
from pretrain.models.config import ModelConfig
from pretrain.optimizer_config import OptimizerConfig
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
