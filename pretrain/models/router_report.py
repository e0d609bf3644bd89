"""What routers report of a forward pass: returned by blocks, summed over layers, micro-batches and ranks."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pretrain.models.config import ModelConfig

BINS = 2048
_FINE, _FAR = 0.01, 1000.0
"""Bins are equally wide in asinh(score / _FINE): 1e-4 near 0, 1.2 % of a score far from it, up to _FAR."""
_PER_UNIT = BINS / 2 / float(np.arcsinh(_FAR / _FINE))


@dataclass(frozen=True)
class DepthCounts:
    """What one depth router counts, over the tokens that may skip: neither padding nor special ones."""

    histogram: Int[Tensor, " bins"]
    """Raw scores."""
    tokens: Int[Tensor, ""]
    run: Int[Tensor, ""]
    """Tokens that run."""
    gate: Float[Tensor, ""]
    """Sum of the gates, of tokens that run and of tokens that skip."""
    gate_squared: Float[Tensor, ""]
    """Sum of the squared gates."""


@dataclass(frozen=True)
class ExpertCounts:
    """What the router of one tower counts in one layer, over the tower's tokens, padding left out."""

    histogram: Int[Tensor, "experts bins"]
    """Log probabilities. Token choice, which needs no thresholds, has no bins."""
    taken: Int[Tensor, " experts"]
    """Tokens that each expert takes."""
    tokens: Int[Tensor, ""]
    dropped: Int[Tensor, ""]
    """Tokens that no expert takes."""
    load_balance: Float[Tensor, ""]
    """Load-balancing loss without its weight, summed over tokens; 0 where it has no weight."""
    router_z: Float[Tensor, ""]
    """Router z-loss without its weight, summed over tokens; 0 where it has no weight."""


def _zero(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


@dataclass(frozen=True)
class BlockReport:
    """What the routers of one block report."""

    visible_pairs: Int[Tensor, ""] = field(default_factory=_zero)
    """(query, key) pairs that attention computes, padding left out; 0 in a block without depth routers."""
    depth: Mapping[str, DepthCounts] = field(default_factory=dict)
    """Modality -> counts of its depth router."""
    experts: Mapping[str, ExpertCounts] = field(default_factory=dict)
    """Tower -> counts of its experts."""
    ran: tuple[Bool[np.ndarray, "sequences tokens"], ...] = ()
    """Per micro-batch: which tokens ran, in sequence order. Empty unless `ModelInputs.report_ran` asks."""


@dataclass(frozen=True)
class RouterReport:
    """Layer -> report of its block. A sum of reports adds counts of the same router, and joins `ran`."""

    layers: Mapping[int, BlockReport] = field(default_factory=dict)

    def __add__(self, other: "RouterReport") -> "RouterReport":
        return _sum(self, other)

    def detach(self) -> "RouterReport":
        """The same numbers without their graph: auxiliary losses have one until then."""
        return _map(Tensor.detach, self)

    def on_host(self) -> "RouterReport":
        """The same counts as float64 on the host, where sums of them are exact."""
        return _map(lambda tensor: tensor.cpu().double(), self)

    def pack(self) -> Float[Tensor, " numbers"]:
        """All counts as one vector; `ran` is left out. Needs a report `on_host`."""
        return torch.cat([tensor.flatten() for tensor in _tensors(self)])

    def unpack(self, packed: Float[Tensor, " numbers"]) -> "RouterReport":
        """A report of the same layers, routers and shapes as this one, with the numbers of `packed`."""
        sizes = [tensor.numel() for tensor in _tensors(self)]
        pieces = iter(packed.split(sizes))
        return _map(lambda tensor: next(pieces).view(tensor.shape), self)


def no_counts(config: ModelConfig) -> RouterReport:
    """The report of a whole model before any token: 0 for every router. Its order is that of `pack`."""

    def depth() -> DepthCounts:
        return DepthCounts(
            histogram=_zero(BINS), tokens=_zero(), run=_zero(), gate=_zero(), gate_squared=_zero()
        )

    def experts(tower: str) -> ExpertCounts:
        of_tower = config.experts[tower]
        return ExpertCounts(
            histogram=_zero(of_tower.num_experts, 0 if of_tower.causal else BINS),
            taken=_zero(of_tower.num_experts),
            tokens=_zero(),
            dropped=_zero(),
            load_balance=_zero(),
            router_z=_zero(),
        )

    return RouterReport(
        {
            layer: BlockReport(
                depth={modality: depth() for modality in config.depth_ratios(layer)},
                experts={tower: experts(tower) for tower in config.experts},
            )
            for layer in range(config.num_layers)
        }
    )


@torch.no_grad()
def score_histogram(scores: Float[Tensor, "*routers scores"]) -> Int[Tensor, "*routers bins"]:
    """How many scores of each router lie in each bin; scores beyond the range lie in the outer bins."""
    scores = scores.float()
    bins = (torch.asinh(scores / _FINE) * _PER_UNIT + BINS / 2).floor().clamp(0, BINS - 1).long()
    empty = torch.zeros(*scores.shape[:-1], BINS, dtype=torch.int64, device=scores.device)
    return empty.scatter_add_(-1, bins, torch.ones_like(bins))


def bin_of(score: float) -> float:
    """Where in the histogram a score lies, in bins from the left edge of the first."""
    return float(np.arcsinh(score / _FINE) * _PER_UNIT + BINS / 2)


def bin_edges(index: int) -> tuple[float, float]:
    """Least score in a bin, and least score in the next one."""
    left, right = _FINE * np.sinh((np.array([index, index + 1]) - BINS / 2) / _PER_UNIT)
    return float(left), float(right)


def _sum(a: Any, b: Any) -> Any:
    """`a` + `b`: tensors and tuples by +, mappings by key, dataclasses by field. Keys are in the order of
    `a`."""
    if isinstance(a, Tensor | tuple):
        return a + b
    if isinstance(a, Mapping):
        return {**a, **b, **{key: _sum(a[key], b[key]) for key in a if key in b}}
    return replace(a, **{f.name: _sum(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)})


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with every tensor changed, in the order of `_tensors`."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return value
    if isinstance(value, Mapping):
        return {key: _map(change, inner) for key, inner in value.items()}
    return replace(value, **{f.name: _map(change, getattr(value, f.name)) for f in fields(value)})


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a report: layers and routers in the order of their mappings, fields as declared."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif not isinstance(value, tuple):
        for f in fields(value):
            yield from _tensors(getattr(value, f.name))
