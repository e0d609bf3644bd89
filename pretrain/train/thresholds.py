"""Thresholds by which tokens are chosen causally: running quantiles of the scores of all ranks.

Depth routers and experts count their scores in every training forward pass, whatever the rule. After the step
the counts of all ranks are summed, and the quantile that would have let a share of the scores through moves
the router's threshold (Expert Threshold, arXiv 2603.11535; megatron-core's
quantile balancing sums histograms in the same way). A threshold is constant within a step: the same for
recomputation, micro-batches, stages and evaluation, and no score of a later token has part in it.

Scores drift while routers learn, and a quantile of past scores lags behind. So the target share is the ratio
less the excess that was let through before: adaptive conformal inference (Gibbs and Candes, arXiv 2106.00072,
equation 2). Summed over steps the excess stays bounded, so its mean over n steps falls as 1 / n,
however the scores drift.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from pretrain.models.router_report import BINS, bin_edges, bin_of

Histogram = Float[np.ndarray, " bins"]
"""Scores of one router over all ranks in one optimizer step, see pretrain/models/router_report.py."""


def quantile(histogram: Histogram, share: float) -> float:
    """The score below which `share` of the counted scores lie, interpolated inside its bin."""
    cumulated = np.cumsum(histogram)
    wanted = share * cumulated[-1]
    index = min(int(np.searchsorted(cumulated, wanted, side="right")), BINS - 1)
    before = cumulated[index - 1] if index else 0.0
    inside = (wanted - before) / histogram[index] if histogram[index] else 0.0
    left, right = bin_edges(index)
    return float(np.float32(left + min(max(inside, 0.0), 1.0) * (right - left)))


def share_above(histogram: Histogram, threshold: float) -> float:
    """Share of the counted scores from `threshold` on: the inverse of `quantile`."""
    cumulated = np.concatenate(([0.0], np.cumsum(histogram)))
    index = int(np.clip(np.floor(bin_of(threshold)), 0, BINS - 1))
    left, right = bin_edges(index)
    inside = min(max((threshold - left) / (right - left), 0.0), 1.0)
    return 1 - float((cumulated[index] + inside * histogram[index]) / cumulated[-1])


@dataclass(frozen=True)
class ShareTarget:
    """The share of its scores that a router is to let through."""

    ratio: float
    """Share in the next step. 1: the router lets every token through and has no threshold."""
    before: float
    """Share in the step that was counted. Where the two differ, an average over steps would lag."""
    momentum: float
    """Share of the old threshold in the new one."""


GAIN = 0.15
"""Gain on the excess share, times 1 - momentum. It stays below the rate of the average over steps, or the two
loops would oscillate."""


def next_thresholds(
    thresholds: Mapping[str, float],
    shares: Mapping[str, float],
    histograms: Mapping[str, Histogram],
    targets: Mapping[str, ShareTarget],
) -> tuple[dict[str, float], dict[str, float]]:
    """New thresholds and target shares from the old ones and this step's scores, all by router name.

    A router without a score in this step keeps its threshold; one that lets every token through has none.
    """
    new_thresholds: dict[str, float] = {}
    new_shares: dict[str, float] = {}
    for name, target in targets.items():
        histogram, old = histograms[name], thresholds.get(name)
        seen = bool(histogram.any())
        if target.ratio >= 1:
            continue
        if old is None:
            if seen:
                new_thresholds[name], new_shares[name] = quantile(histogram, 1 - target.ratio), target.ratio
            continue
        share = shares.get(name, target.before) + target.ratio - target.before
        if not seen:
            new_thresholds[name], new_shares[name] = old, share
            continue
        excess = share_above(histogram, old) - target.before
        new_shares[name] = min(max(share - GAIN * (1 - target.momentum) * excess, 0.0), 1.0)
        now = quantile(histogram, 1 - new_shares[name])
        if target.ratio == target.before:
            now = float(np.float32(target.momentum * old + (1 - target.momentum) * now))
        new_thresholds[name] = now
    return new_thresholds, new_shares
