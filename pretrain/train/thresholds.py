"""Thresholds by which tokens are chosen causally: running quantiles of the scores of all ranks.

Places where tokens are chosen (a depth router, an expert) count their raw scores in every training forward
pass, whatever the rule. After the step the counts of all ranks are summed, and the quantile that would have
let a share of them through moves the place's threshold (Expert Threshold, arXiv 2603.11535; megatron-core's
quantile balancing sums histograms in the same way). A threshold is constant within a step: the same for
recomputation, micro-batches, stages and evaluation, and no score of a later token has part in it.

Scores drift while routers learn, and a quantile of past scores lags behind. So the share asked for is the
wanted one less what was let through too much: adaptive conformal inference (Gibbs and Candes, arXiv
2106.00072, equation 2). Summed over steps the excess stays bounded, so its mean over n steps falls as 1 / n,
however the scores drift.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from parallel.world import World
from pretrain.models.routing_state import _FINE, _PER_UNIT, BINS, SUMS, counts_in


@dataclass(frozen=True)
class RouterCounts:
    """At one place, over all data-parallel ranks, in one optimizer step."""

    histogram: np.ndarray
    """float64 [BINS]."""
    sums: tuple[float, ...]


def take_counts(module: nn.Module, places: Iterable[str], world: World) -> dict[str, RouterCounts]:
    """What the ranks have counted since the last time, equal on all of them, which all call it.

    `places`: of the whole model; a pipeline stage has some of them. Tensor-parallel ranks, which all see the
    same tokens, count once.
    """
    names = list(places)
    row = {name: index for index, name in enumerate(names)}
    mine = torch.zeros(len(names), BINS + SUMS, dtype=torch.float64)
    for counts in counts_in(module):
        mine[row[counts.name]] += counts.take()
    total = (world.sum_tensor_over_all(mine) / world.tp_size).numpy()
    return {name: RouterCounts(total[i, :BINS], tuple(total[i, BINS:].tolist())) for name, i in row.items()}


def quantile(histogram: np.ndarray, share: float) -> float:
    """The score below which `share` of the counted ones are, interpolated inside its bin."""
    cumulated = np.cumsum(histogram)
    wanted = share * cumulated[-1]
    index = min(int(np.searchsorted(cumulated, wanted, side="right")), BINS - 1)
    before = cumulated[index - 1] if index else 0.0
    inside = (wanted - before) / histogram[index] if histogram[index] else 0.0
    edges = _FINE * np.sinh((np.array([index, index + 1]) - BINS / 2) / _PER_UNIT)
    return float(np.float32(edges[0] + min(max(inside, 0.0), 1.0) * (edges[1] - edges[0])))


def share_above(histogram: np.ndarray, threshold: float) -> float:
    """Share of the counted scores from `threshold` on: the inverse of `quantile`."""
    cumulated = np.concatenate(([0.0], np.cumsum(histogram)))
    position = np.arcsinh(threshold / _FINE) * _PER_UNIT + BINS / 2
    index = int(np.clip(np.floor(position), 0, BINS - 1))
    left, right = _FINE * np.sinh((np.array([index, index + 1]) - BINS / 2) / _PER_UNIT)
    inside = min(max((threshold - left) / (right - left), 0.0), 1.0)
    return 1 - float((cumulated[index] + inside * histogram[index]) / cumulated[-1])


@dataclass(frozen=True)
class ShareTarget:
    """What a place is to let through."""

    ratio: float
    """Share of the scores in the next step. 1: all, whatever they are."""
    before: float
    """The same of the step that was counted. Where the two differ, an average over steps would lag."""
    momentum: float
    """Share of the old threshold in the new one."""


GAIN = 0.15
"""Of what was let through too much in a step, what the next one asks less, times 1 - momentum: slower than
the average over steps, or the two would swing."""


def next_thresholds(
    thresholds: Mapping[str, float],
    shares: Mapping[str, float],
    counted: Mapping[str, RouterCounts],
    wanted: Mapping[str, ShareTarget],
) -> tuple[dict[str, float], dict[str, float]]:
    """Thresholds for the next step, and the shares that they were asked for.

    Places without a score in this one keep theirs; places that let all through have none.
    """
    found: dict[str, float] = {}
    asked: dict[str, float] = {}
    for name, want in wanted.items():
        histogram, old = counted[name].histogram, thresholds.get(name)
        seen = bool(histogram.any())
        if want.ratio >= 1:
            continue
        if old is None:
            if seen:
                found[name], asked[name] = quantile(histogram, 1 - want.ratio), want.ratio
            continue
        share = shares.get(name, want.before) + want.ratio - want.before
        if not seen:
            found[name], asked[name] = old, share
            continue
        excess = share_above(histogram, old) - want.before
        asked[name] = min(max(share - GAIN * (1 - want.momentum) * excess, 0.0), 1.0)
        now = quantile(histogram, 1 - asked[name])
        if want.ratio == want.before:
            now = float(np.float32(want.momentum * old + (1 - want.momentum) * now))
        found[name] = now
    return found, asked
