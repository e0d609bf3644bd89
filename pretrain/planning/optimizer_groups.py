"""The groups of parameters that the optimizer treats alike, as a table for a person. Imports no torch."""

import math

from pretrain.config import RunConfig
from pretrain.models.accounting import aligned
from pretrain.models.logical_weights import logical_shapes
from pretrain.parameter_settings import settings_of, tower_of


def describe_groups(config: RunConfig) -> str:
    """A row for each group: its parameters, its peak learning rate and its weight decay. A group is named
    by tower, by whether weight decay acts on it, and by the optimizer.groups that match it; "+mup": its rate
    follows the width."""
    optimizer = config.optimizer
    counts: dict[tuple[str, str, str], int] = {}
    for name, shape in logical_shapes(config.model).items():
        own = settings_of(name, shape, optimizer, config.model)
        row = (f"{tower_of(name)}/frozen", "-", "-")
        if own is not None:
            rate = optimizer.learning_rate * own.lr_scale
            row = (f"{own.tower}/{own.kind}", f"{rate:.4g}", f"{own.weight_decay:g}")
        counts[row] = counts.get(row, 0) + math.prod(shape)
    rows = [["optimizer's groups", "parameters", "learning rate", "weight decay"]]
    rows += [[name, f"{count:,}", rate, decay] for (name, rate, decay), count in counts.items()]
    lines = aligned(rows)
    if config.model.width_ratio != 1:
        lines.append(f"mup: {config.model.width_ratio:g} times as wide as model.mup_base_width")
    return "\n".join(lines)
