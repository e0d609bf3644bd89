"""What follows from the routers' reports of an optimizer step: thresholds for the next step, FLOPs that depth
routing saved, and metrics of depth. Those of experts are in expert_steps.py."""

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import TYPE_CHECKING, NamedTuple

from pretrain.metrics import RouterSums, Sums
from pretrain.models.config import ModelConfig
from pretrain.models.depth_accounting import Skipped
from pretrain.train import expert_steps

if TYPE_CHECKING:
    from parallel.world import World
    from pretrain.models.router_report import DepthCounts, RouterReport
    from pretrain.train.thresholds import Histogram


class DepthRouter(NamedTuple):
    layer: int
    modality: str
    ratio: float
    """Share of the modality's tokens that run in the layer after warm-up."""


def routers(model: ModelConfig) -> dict[str, DepthRouter]:
    """Name of each depth router, as thresholds and metrics know it -> where it is."""
    return {
        f"blocks.{layer}.depth.{modality}": DepthRouter(layer, modality, ratio)
        for layer in range(model.num_layers)
        for modality, ratio in model.depth_ratios(layer).items()
    }


def sum_over_ranks(report: "RouterReport", model: ModelConfig, world: "World") -> "RouterReport":
    """The reports of all ranks in one, equal on all of them, which all call it; of a model without routers
    `report` itself. A pipeline stage reports some layers. Tensor-parallel ranks, which all see the same
    tokens, count once."""
    if not (model.depth or model.experts):
        return report
    from pretrain.models.router_report import no_counts

    whole = no_counts(model)
    mine = (whole + report.on_host()).pack()
    return whole.unpack(world.sum_tensor_over_all(mine) / world.tp_size)


def thresholds_after(
    thresholds: Mapping[str, float],
    shares: Mapping[str, float],
    report: "RouterReport",
    model: ModelConfig,
    *,
    step: int,
    num_steps: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Thresholds and target shares for the step that comes after `step` others, from those of the step before
    and its report."""
    from pretrain.train.thresholds import ShareTarget, next_thresholds

    targets: dict[str, ShareTarget] = expert_steps.share_targets(model)
    for name, router in routers(model).items():
        depth = model.depth[router.modality]
        before, now = (depth.ratio_at(router.ratio, done / num_steps) for done in (step - 1, step))
        targets[name] = ShareTarget(now, before, depth.threshold_momentum)
    histograms = _histograms(report, model) | expert_steps.histograms(report, model)
    return next_thresholds(thresholds, shares, histograms, targets)


def _histograms(report: "RouterReport", model: ModelConfig) -> "dict[str, Histogram]":
    return {name: counts.histogram.numpy() for name, _, counts in _counts(report, model)}


def skipped(model: ModelConfig, report: "RouterReport", visible_pairs: int) -> Skipped | None:
    """What was saved of a step whose masks show `visible_pairs` pairs; None for a model without depth."""
    if not model.depth:
        return None
    tokens = dict.fromkeys(model.depth, 0)
    for _, router, counts in _counts(report, model):
        tokens[router.modality] += int(counts.tokens) - int(counts.run)
    if model.depth_block.parts == "feed_forward":
        return Skipped(tokens, 0)
    pairs = sum(int(report.layers[layer].visible_pairs) for layer in model.whole_blocks)
    return Skipped(tokens, visible_pairs * len(model.whole_blocks) - pairs)


def router_sums(model: ModelConfig, report: "RouterReport") -> RouterSums:
    """What a step adds to the sums of routers, of depth and of experts, that rows of metrics are made of."""
    depth = {
        name: {
            "tokens": float(counts.tokens),
            "run": float(counts.run),
            "gate": float(counts.gate),
            "gate_squared": float(counts.gate_squared),
        }
        for name, _, counts in _counts(report, model)
    }
    return depth | expert_steps.router_sums(model, report)


def _counts(report: "RouterReport", model: ModelConfig) -> "Iterator[tuple[str, DepthRouter, DepthCounts]]":
    """(name, router, counts) of each depth router."""
    for name, router in routers(model).items():
        yield name, router, report.layers[router.layer].depth[router.modality]


def row(model: ModelConfig, window: Mapping[str, Sums]) -> dict[str, float]:
    """depth/ratio/<m>, depth/ratio/<m>/<layer> and depth/gate_std/<m>, of routed layers alone, from the
    routers' sums of a window. A modality without a token in the window has none."""
    metrics: dict[str, float] = {}
    for modality in sorted(model.depth):
        of_layers = {
            router.layer: window[name]
            for name, router in routers(model).items()
            if router.modality == modality and name in window
        }
        if not of_layers or not all(sums["tokens"] for sums in of_layers.values()):
            continue
        ratios = {layer: sums["run"] / sums["tokens"] for layer, sums in of_layers.items()}
        tokens, gate, gate_squared = (
            sum(sums[what] for sums in of_layers.values()) for what in ("tokens", "gate", "gate_squared")
        )
        metrics[f"depth/ratio/{modality}"] = sum(ratios.values()) / len(ratios)
        metrics |= {f"depth/ratio/{modality}/{layer}": ratio for layer, ratio in ratios.items()}
        metrics[f"depth/gate_std/{modality}"] = sqrt(max(0.0, gate_squared / tokens - (gate / tokens) ** 2))
    return metrics
