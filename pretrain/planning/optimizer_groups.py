"""A table shows a person which parameters the optimizer treats alike. This module imports no torch."""

import math

from pretrain.config import RunConfig
from pretrain.models.accounting import aligned
from pretrain.models.logical_weights import counted_layers
from pretrain.parameter_settings import settings_of, tells_blocks_apart, tower_of


def describe_groups(config: RunConfig) -> str:
    """A row for each group: its parameters, its peak learning rate and its weight decay. A group is named
    by tower, by whether weight decay acts on it, and by the optimizer.groups that match it; "+muon":
    Muon's matrices; "+mup": its rate follows the width."""
    optimizer = config.optimizer
    counts: dict[tuple[str, str, str], int] = {}
    for layer, number in counted_layers(config.model, apart=tells_blocks_apart(optimizer)):
        for name in layer.names(config.model).values():
            own = settings_of(name, layer.shape, optimizer, config.model)
            row = (f"{tower_of(name)}/frozen", "-", "-")
            if own is not None:
                rate = optimizer.learning_rate * own.lr_scale
                row = (f"{own.tower}/{own.kind}", f"{rate:.4g}", f"{own.weight_decay:g}")
            counts[row] = counts.get(row, 0) + number * math.prod(layer.shape)
    rows = [["optimizer's groups", "parameters", "learning rate", "weight decay"]]
    rows += [[name, f"{count:,}", rate, decay] for (name, rate, decay), count in counts.items()]
    lines = aligned(rows)
    if config.model.width_ratio != 1:
        lines.append(f"mup: {config.model.width_ratio:g} times as wide as model.mup_base_width")
    return "\n".join(lines)
