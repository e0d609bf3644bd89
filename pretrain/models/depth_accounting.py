"""What depth routing saves: FLOPs of tokens that skip and of pairs that nobody looks at. Imports no torch.

A router's own dot product, 2 d_model a token, is left out of the ledger, as norms are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from pretrain.models.config import ModelConfig


@dataclass(frozen=True)
class Skipped:
    """Over all layers. Counted ones are whole numbers, expected ones need not be."""

    tokens: Mapping[str, float]
    """Modality -> tokens that did not run, a token that skipped two layers twice."""
    pairs: float
    """(query, key) pairs that a mask shows in a dense model, and that no attention computed."""


def skippable_flops(config: ModelConfig, modality: str) -> dict[str, int]:
    """Module -> forward FLOPs that a token saves by skipping one layer, attention's pairs left out."""
    d, heads, kv_heads = config.d_model, config.num_heads, config.kv_heads
    active = config.feed_forward_parameters(config.towers[modality], active=True)
    found = {"attention": 0, "feed_forward": 2 * active}
    if config.depth_block.parts != "feed_forward":
        matrices = 2 * heads + (2 * kv_heads if config.depth_block.keys == "selected" else 0)
        found["attention"] = 2 * d * matrices * config.head_dim
    return found


def skipped_per_token(config: ModelConfig, modality: str, progress: float = 1.0) -> float:
    """Layers that a token of the modality is expected to skip, at `progress` of the run."""
    if modality not in config.depth:
        return 0.0
    depth = config.depth[modality]
    ratios = (ratio for ratio in depth.ratios(config.num_layers) if ratio is not None)
    return sum(1 - depth.ratio_at(ratio, progress) for ratio in ratios)


def run_shares(config: ModelConfig) -> dict[int, float]:
    """Layer with routers -> expected share of tokens that run in it after warm-up, if they are of every
    modality alike."""
    skipped = {i: sum(1 - r for r in of.values()) for i, of in enumerate(config.ratios_of_layers()) if of}
    return {i: 1 - share / len(config.towers) for i, share in skipped.items()}


def pairs_share(
    config: ModelConfig, depth_ratios: Mapping[str, float], tokens: Mapping[str, float], progress: float = 1.0
) -> float:
    """Expected share of the pairs of a layer with `depth_ratios` that attention computes, where `tokens` are
    of each modality and those that skip are spread evenly."""
    if not depth_ratios or config.depth_block.parts == "feed_forward" or not (total := sum(tokens.values())):
        return 1.0
    ratios = {m: config.depth[m].ratio_at(ratio, progress) for m, ratio in depth_ratios.items()}
    queries = sum(count * ratios.get(modality, 1.0) for modality, count in tokens.items()) / total
    return queries * queries if config.depth_block.keys == "selected" else queries


def query_shares(config: ModelConfig) -> dict[str, float]:
    """Modality -> expected share, over all layers, of the pairs of a token of the modality as query that
    attention computes; keys are of every modality alike."""
    if not config.depth:
        return dict.fromkeys(config.towers, 1.0)
    alike, totals = dict.fromkeys(config.towers, 1.0), dict.fromkeys(config.towers, 0.0)
    for ratios in config.ratios_of_layers():
        share = pairs_share(config, ratios, alike)
        keys = share**0.5 if config.depth_block.keys == "selected" else 1.0
        for modality in totals:
            totals[modality] += ratios.get(modality, 1.0) * keys if share < 1 else share
    return {modality: total / config.num_layers for modality, total in totals.items()}


def describe(config: ModelConfig, modality: str) -> str:
    """A line for a person."""
    depth, block = config.depth[modality], config.depth_block
    ratios = ["1" if r is None else f"{r:.2f}" for r in depth.ratios(config.num_layers)]
    causal = "causal" if depth.is_causal else "looks at later tokens"
    return (
        f"depth of {modality}: {depth.schedule}, mean {depth.mean_ratio:g}, {depth.rule} ({causal}), gate "
        f"{depth.gate} on {block.scale}; {block.parts}, keys {block.keys}; layers {' '.join(ratios)}"
    )


def expected(
    config: ModelConfig, tokens: Mapping[str, float], visible_pairs: float, progress: float = 1.0
) -> Skipped:
    """Of `tokens` of each modality whose masks show `visible_pairs` pairs, at `progress` of the run."""
    hidden = sum(1 - pairs_share(config, r, tokens, progress) for r in config.ratios_of_layers())
    skipped = {m: count * skipped_per_token(config, m, progress) for m, count in tokens.items()}
    return Skipped(skipped, hidden * visible_pairs)


def over_run(config: ModelConfig, tokens: Mapping[str, float], visible_pairs: float) -> Skipped | None:
    """The mean of `expected` over a whole run, warm-up included; None for a model without depth routing."""
    if not config.depth:
        return None
    # Between the ends of warm-ups what is skipped is a polynomial of progress, of degree 2 at most: Simpson's
    # rule is exact there.
    ends = {0.0, 1.0}
    for depth in config.depth.values():
        ends |= {depth.dense_frac, depth.dense_frac + depth.ramp_frac}
    skipped, pairs = dict.fromkeys(tokens, 0.0), 0.0
    for first, last in pairwise(sorted(ends)):
        inner = 1e-12  # a ratio may jump at an end
        points = (first, inner), (first, (last - first) / 2), (last, -inner)
        for (start, offset), weight in zip(points, (1, 4, 1), strict=True):
            at = expected(config, tokens, visible_pairs, start + offset)
            share = weight * (last - first) / 6
            pairs += share * at.pairs
            skipped = {m: total + share * at.tokens[m] for m, total in skipped.items()}
    return Skipped(skipped, pairs)


def saved_flops(config: ModelConfig, skipped: Skipped) -> int:
    """Forward FLOPs."""
    linear = sum(
        # Exact for whole numbers, however large.
        Fraction(count) * sum(skippable_flops(config, modality).values())
        for modality, count in skipped.tokens.items()
        if modality in config.depth
    )
    return round(linear + Fraction(skipped.pairs) * 4 * config.num_heads * config.head_dim)
