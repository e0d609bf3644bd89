"""A table shows a person which parameters the optimizer treats alike. This module imports no torch."""

import fnmatch
import math
import re

from pretrain.config import RunConfig
from pretrain.models.accounting import aligned
from pretrain.models.logical_weights import counted_layers
from pretrain.parameter_settings import settings_of, tells_blocks_apart, tower_of

Row = tuple[str, str, str]
"""Name of a group, its peak learning rate and its weight decay."""


def _row(config: RunConfig, name: str, shape: tuple[int, ...]) -> Row:
    """The group of the parameter with logical name `name`."""
    own = settings_of(name, shape, config.optimizer, config.model)
    if own is None:
        return f"{tower_of(name)}/frozen", "-", "-"
    rate = config.optimizer.learning_rate * own.lr_scale
    return f"{own.tower}/{own.kind}", f"{rate:.4g}", f"{own.weight_decay:g}"


def describe_groups(config: RunConfig) -> str:
    """A row for each group: its parameters, its peak learning rate and its weight decay. A group is named
    by tower, by whether weight decay acts on it, and by the optimizer.groups that match it; "+muon":
    Muon's matrices; "+mup": its rate follows the width."""
    optimizer = config.optimizer
    named = [
        (name, layer.shape, number)
        for layer, number in counted_layers(config.model, apart=tells_blocks_apart(optimizer))
        for name in layer.names(config.model).values()
    ]
    matched = [set(fnmatch.filter((name for name, _, _ in named), group.match)) for group in optimizer.groups]
    # A deep model has 100,000 names and few rows. Names that differ in the block alone share a row.
    rows: dict[tuple[str, tuple[bool, ...]], Row] = {}
    counts: dict[Row, int] = {}
    for name, shape, number in named:
        kind = re.sub(r"^blocks\.\d+", "", name), tuple(name in of for of in matched)
        if kind not in rows:
            rows[kind] = _row(config, name, shape)
        counts[rows[kind]] = counts.get(rows[kind], 0) + number * math.prod(shape)
    table = [["optimizer's groups", "parameters", "learning rate", "weight decay"]]
    table += [[name, f"{count:,}", rate, decay] for (name, rate, decay), count in counts.items()]
    lines = aligned(table)
    if config.model.width_ratio != 1:
        lines.append(f"mup: {config.model.width_ratio:g} times as wide as model.mup_base_width")
    return "\n".join(lines)
