"""What tokens are chosen by in a forward pass, and what routers count in it."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

BINS = 2048


SUMS = 8
"""Numbers that a place may sum beside its scores."""


_FINE, _FAR = 0.01, 1000.0
"""Bins are equally wide in asinh(score / _FINE): 1e-4 near 0, 1.2 % of a score far from it, up to _FAR."""


@dataclass(frozen=True)
class RoutingState:
    """What tokens are chosen by in a forward pass; one value for all micro-batches of a step."""

    causal: bool = False
    """Choose by thresholds whatever the rule: how a model whose rule looks at later tokens is evaluated."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Place -> threshold. A place that has none yet lets everything through."""
    progress: float = 1.0
    """Share of the run that is done: where ratios are in their warm-up."""


class ScoreCounts:
    """What a place has counted since `take`. Plain tensors: buffers would be cast with the module."""

    def __init__(self, name: str) -> None:
        """`name`: the place's, such as "blocks.3.depth.image"."""
        self.name = name
        self.paused = False
        self._histogram: Tensor | None = None
        self._sums: list[Tensor | float] = [0.0] * SUMS

    @torch.no_grad()
    def add(self, scores: Float[Tensor, " n"], *sums: Tensor | float) -> None:
        """Count raw scores, and add `sums`, at most SUMS numbers that mean what the place says."""
        if self.paused:
            return
        if self._histogram is None:
            self._histogram = torch.zeros(BINS, dtype=torch.int64, device=scores.device)
        scores = scores.float()
        bins = (torch.asinh(scores / _FINE) * _PER_UNIT + BINS / 2).floor().clamp(0, BINS - 1).long()
        self._histogram.scatter_add_(0, bins, torch.ones_like(bins))
        for index, value in enumerate(sums):
            self._sums[index] = self._sums[index] + value

    def take(self) -> Float[Tensor, " bins_and_sums"]:
        """The counts, then the sums, as float64 on the host; both start again at 0."""
        empty = torch.zeros(BINS, dtype=torch.float64)
        counted = empty if self._histogram is None else self._histogram.cpu().double()
        sums = torch.tensor([float(value) for value in self._sums], dtype=torch.float64)
        self._histogram, self._sums = None, [0.0] * SUMS
        return torch.cat((counted, sums))


_PER_UNIT = BINS / 2 / float(np.arcsinh(_FAR / _FINE))


def counts_in(module: nn.Module) -> Iterable[ScoreCounts]:
    """Those of all layers: every place is in the `score_counts` of the module that it belongs to."""
    for each in module.modules():
        yield from getattr(each, "score_counts", ())


@contextmanager
def uncounted(module: nn.Module) -> Iterator[None]:
    """For a forward pass that is made a second time: its places have counted already."""
    places = list(counts_in(module))
    for each in places:
        each.paused = True
    try:
        yield
    finally:
        for each in places:
            each.paused = False
