"""What routers of experts count in an optimizer step, and what comes of it: metrics, and thresholds by which
experts choose where no later token may have a say (pretrain/train/thresholds.py). Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pretrain.metrics import Sums
from pretrain.models.config import ModelConfig

if TYPE_CHECKING:
    from pretrain.train.thresholds import RouterCounts, ShareTarget

MOMENTUM = 0.95
"""Share of the old threshold in the new one."""
_AUXILIARY = ("load_balance", "router_z")
_SUMS = ("taken", "tokens", "dropped", *_AUXILIARY)
"""Of an expert: tokens that it took; of the first one of a layer also tokens, those that none took, and
auxiliary losses without their weights."""


class Place(NamedTuple):
    layer: int
    tower: str
    expert: int


def places(model: ModelConfig) -> dict[str, Place]:
    """Name of each expert -> where it is."""
    return {
        f"blocks.{layer}.experts.{tower}.{expert}": Place(layer, tower, expert)
        for layer in range(model.num_layers)
        for tower, experts in model.experts.items()
        for expert in range(experts.num_experts)
    }


def wanted(model: ModelConfig) -> "dict[str, ShareTarget]":
    """What thresholds are to let through: of expert choice, as much as it takes."""
    from pretrain.train.thresholds import ShareTarget

    found = {}
    for name, place in places(model).items():
        experts = model.experts[place.tower]
        if not experts.causal:
            share = experts.capacity_factor / experts.num_experts
            found[name] = ShareTarget(share, share, MOMENTUM)
    return found


def rows_taken(model: ModelConfig, counted: "Mapping[str, RouterCounts]") -> dict[str, int]:
    """Tower -> tokens that its experts took, in all layers together; for the FLOPs ledger."""
    found = dict.fromkeys(model.experts, 0)
    for name, place in places(model).items():
        found[place.tower] += round(counted[name].sums[0])
    return found


def step_sums(model: ModelConfig, counted: "Mapping[str, RouterCounts]") -> Sums:
    """What a step adds to the sums that rows are made of."""
    found: Sums = {}
    if not counted:
        return found
    for name, (layer, tower, expert) in places(model).items():
        values = dict(zip(_SUMS, counted[name].sums, strict=False))
        found[f"experts/taken/{tower}/{layer}/{expert}"] = values["taken"]
        if expert == 0:
            found |= {f"experts/{what}/{tower}/{layer}": values[what] for what in _SUMS[1:]}
    return found


def row(model: ModelConfig, window: Mapping[str, float]) -> dict[str, float]:
    """experts/load_max_over_mean/<tower>, experts/drop_frac/<tower> and the auxiliary losses that have a
    weight, means over layers, from the sums of a window. A tower without a token in it has none."""
    found: dict[str, float] = {}
    for tower, experts in model.experts.items():
        per_token = {"dropped": "drop_frac"} | {name: name for name in _AUXILIARY if getattr(experts, name)}
        of_layers: dict[str, list[float]] = {}
        for layer in range(model.num_layers):
            names = [f"experts/taken/{tower}/{layer}/{e}" for e in range(experts.num_experts)]
            taken = [window.get(name, 0.0) for name in names]
            if not sum(taken):
                continue
            of_layers.setdefault("load_max_over_mean", []).append(max(taken) * len(taken) / sum(taken))
            tokens = window[f"experts/tokens/{tower}/{layer}"]
            for what, name in per_token.items():
                of_layers.setdefault(name, []).append(window[f"experts/{what}/{tower}/{layer}"] / tokens)
        found |= {f"experts/{name}/{tower}": sum(each) / len(each) for name, each in of_layers.items()}
    return found
