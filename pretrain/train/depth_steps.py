"""What depth routers count in an optimizer step, and what comes of it: thresholds for the next step, FLOPs
that were saved, and metrics."""

from collections.abc import Mapping
from math import sqrt
from typing import TYPE_CHECKING

from pretrain.metrics import Sums
from pretrain.models.config import ModelConfig
from pretrain.models.depth_accounting import SUMS, Skipped
from pretrain.train import expert_steps

if TYPE_CHECKING:
    from torch import nn

    from parallel.world import World
    from pretrain.train.thresholds import RouterCounts

*_SUMS, _ = SUMS  # the last are pairs, of a block and not of a modality


def places(model: ModelConfig) -> dict[str, tuple[int, str, float]]:
    """Name of each router -> (layer, modality, ratio after warm-up)."""
    return {
        f"blocks.{layer}.depth.{modality}": (layer, modality, ratio)
        for layer in range(model.num_layers)
        for modality, ratio in model.depth_ratios(layer).items()
    }


def count_step(module: "nn.Module", model: ModelConfig, world: "World") -> "dict[str, RouterCounts]":
    """What all ranks' routers, of depth and of experts, have counted since the last step; nothing for a model
    without. All ranks call it."""
    names = [*places(model), *expert_steps.places(model)]
    if not names:
        return {}
    from pretrain.train.thresholds import take_counts

    return take_counts(module, names, world)


def thresholds_after(
    thresholds: Mapping[str, float],
    shares: Mapping[str, float],
    counted: "Mapping[str, RouterCounts]",
    model: ModelConfig,
    *,
    step: int,
    num_steps: int,
) -> tuple[dict[str, float], dict[str, float]]:
    """Thresholds for the step that comes after `step` others, and the shares that they were asked for, from
    those of the step before and its counts."""
    from pretrain.train.thresholds import ShareTarget, next_thresholds

    wanted: dict[str, ShareTarget] = expert_steps.wanted(model)
    for name, (_, modality, ratio) in places(model).items():
        depth = model.depth[modality]
        before, now = (depth.ratio_at(ratio, done / num_steps) for done in (step - 1, step))
        wanted[name] = ShareTarget(now, before, depth.threshold_momentum)
    return next_thresholds(thresholds, shares, counted, wanted)


def skipped(model: ModelConfig, counted: "Mapping[str, RouterCounts]", visible_pairs: int) -> Skipped | None:
    """What was saved of a step whose masks show `visible_pairs` pairs; None for a model without depth."""
    if not model.depth:
        return None
    tokens, pairs = dict.fromkeys(model.depth, 0), 0
    for name, (_, modality, _) in places(model).items():
        of_all, ran, *_, seen = counted[name].sums[: len(SUMS)]
        tokens[modality] += round(of_all - ran)
        pairs += round(seen)
    if next(iter(model.depth.values())).parts == "feed_forward":
        return Skipped(tokens, 0)
    return Skipped(tokens, visible_pairs * len(model.whole_blocks) - pairs)


def step_sums(model: ModelConfig, counted: "Mapping[str, RouterCounts]") -> Sums:
    """What a step adds to the sums that rows are made of."""
    return {
        f"depth/{what}/{modality}/{layer}": value
        for name, (layer, modality, _) in places(model).items()
        if counted
        for what, value in zip(_SUMS, counted[name].sums, strict=False)
    }


def row(window: Mapping[str, float]) -> dict[str, float]:
    """depth/ratio/<m>, depth/ratio/<m>/<layer> and depth/gate_std/<m>, of routed layers alone, from the sums
    of a window. A modality without a token in the window has none."""
    found: dict[str, float] = {}
    keys = [key.split("/")[2:] for key in window if key.startswith("depth/tokens/")]
    for modality in sorted({modality for modality, _ in keys}):
        layers = sorted(int(layer) for each, layer in keys if each == modality)
        sums = {what: [window[f"depth/{what}/{modality}/{layer}"] for layer in layers] for what in _SUMS}
        if not all(sums["tokens"]):
            continue
        ratios = [ran / tokens for ran, tokens in zip(sums["run"], sums["tokens"], strict=True)]
        tokens = sum(sums["tokens"])
        mean = sum(sums["gate"]) / tokens
        found[f"depth/ratio/{modality}"] = sum(ratios) / len(ratios)
        found |= {f"depth/ratio/{modality}/{layer}": r for layer, r in zip(layers, ratios, strict=True)}
        found[f"depth/gate_std/{modality}"] = sqrt(max(0.0, sum(sums["gate_squared"]) / tokens - mean**2))
    return found
