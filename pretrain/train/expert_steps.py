"""What follows from the reports of experts' routers in an optimizer step: metrics, and thresholds by which
experts choose where no later token may have a say (pretrain/train/thresholds.py). Imports no torch."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from pretrain.metrics import RouterSums, Sums
from pretrain.models.config import ModelConfig
from pretrain.models.experts_config import ExpertsConfig

if TYPE_CHECKING:
    from pretrain.models.router_report import RouterReport
    from pretrain.train.thresholds import Histogram, ShareTarget

MOMENTUM = 0.95
"""Share of the old threshold in the new one."""


class ExpertRouter(NamedTuple):
    layer: int
    tower: str


def routers(model: ModelConfig) -> dict[str, ExpertRouter]:
    """Name of each router of experts, as metrics know it -> where it is."""
    return {
        f"blocks.{layer}.experts.{tower}": ExpertRouter(layer, tower)
        for layer in range(model.num_layers)
        for tower in model.experts
    }


def expert_names(router: str, experts: ExpertsConfig) -> list[str]:
    """Names of a router's experts, as thresholds and metrics know them, in their order."""
    return [f"{router}.{expert}" for expert in range(experts.num_experts)]


def share_targets(model: ModelConfig) -> "dict[str, ShareTarget]":
    """Name of each expert that chooses tokens -> the share that its threshold is to let through: as much as
    the expert takes."""
    from pretrain.train.thresholds import ShareTarget

    targets = {}
    for router, (_, tower) in routers(model).items():
        experts = model.experts[tower]
        if not experts.causal:
            share = experts.capacity_factor / experts.num_experts
            target = ShareTarget(share, share, MOMENTUM)
            targets |= dict.fromkeys(expert_names(router, experts), target)
    return targets


def histograms(report: "RouterReport", model: ModelConfig) -> "dict[str, Histogram]":
    """Name of each expert -> histogram of its scores; without bins under token choice."""
    return {
        name: histogram
        for router, (layer, tower) in routers(model).items()
        for name, histogram in zip(
            expert_names(router, model.experts[tower]),
            report.layers[layer].experts[tower].histogram.numpy(),
            strict=True,
        )
    }


def rows_taken(model: ModelConfig, report: "RouterReport") -> dict[str, int]:
    """Tower -> tokens that its experts took, in all layers together; for the FLOPs ledger."""
    return {
        tower: sum(int(report.layers[layer].experts[tower].taken.sum()) for layer in range(model.num_layers))
        for tower in model.experts
    }


def router_sums(model: ModelConfig, report: "RouterReport") -> RouterSums:
    """What a step adds to the sums that rows of metrics are made of, by router and by expert."""
    sums: RouterSums = {}
    for router, (layer, tower) in routers(model).items():
        counts = report.layers[layer].experts[tower]
        sums[router] = {
            "tokens": float(counts.tokens),
            "dropped": float(counts.dropped),
            "load_balance": float(counts.load_balance),
            "router_z": float(counts.router_z),
        }
        names = expert_names(router, model.experts[tower])
        for name, taken in zip(names, counts.taken.tolist(), strict=True):
            sums[name] = {"taken": float(taken)}
    return sums


def row(model: ModelConfig, window: Mapping[str, Sums]) -> dict[str, float]:
    """experts/load_max_over_mean/<tower>, experts/drop_frac/<tower> and the auxiliary losses that have a
    weight, means over layers, from the routers' sums of a window. A tower without a token in it has none."""
    metrics: dict[str, float] = {}
    for tower, experts in model.experts.items():
        per_token = {"dropped": "drop_frac"}
        per_token |= {name: name for name in ("load_balance", "router_z") if getattr(experts, name)}
        of_layers: dict[str, list[float]] = {}
        for router, (_, of_tower) in routers(model).items():
            if of_tower != tower or router not in window:
                continue
            taken = [window[name]["taken"] for name in expert_names(router, experts)]
            if not sum(taken):
                continue
            of_layers.setdefault("load_max_over_mean", []).append(max(taken) * len(taken) / sum(taken))
            for what, name in per_token.items():
                value = window[router][what] / window[router]["tokens"]
                of_layers.setdefault(name, []).append(value)
        metrics |= {f"experts/{name}/{tower}": sum(v) / len(v) for name, v in of_layers.items()}
    return metrics
