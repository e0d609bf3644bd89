"""Weights are drawn from (seed, layer name) alone, or from (seed, layer name, tower).

So a layer starts the same whatever is built before it, on whatever pipeline stage. By default all towers of a
layer start as copies of one draw: a MoT model computes at step 0 what the dense model of the same seed
computes, and a comparison begins at one loss. Towers part with the first step, because no two of them ever
see the same token. With towers_start = "independent" every tower but the first has a draw of its own.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from parallel.towers import Initialise
from pretrain.models.config import ModelConfig
from pretrain.models.logical_weights import width_role


@dataclass(frozen=True)
class InitialWeights:
    """Normal with `std`; layers that write into the residual stream have std / sqrt(2 num_layers) (GPT-2).
    Those of blocks also follow the width, see ModelConfig.width_ratio."""

    seed: int
    std: float
    num_layers: int
    width_ratio: float = 1.0
    apart: tuple[str, ...] = ()
    """Towers whose weights are drawn by themselves."""

    @classmethod
    def of(cls, config: ModelConfig, seed: int) -> "InitialWeights":
        apart = config.tower_names[1:] if config.towers_start == "independent" else ()
        return cls(seed, config.init_std, config.num_layers, config.width_ratio, apart)

    def normal(self, name: str) -> Initialise:
        """Fills a whole CPU weight of a shard, the same at every call."""
        return self._draw(name, self.std / self._wider(name))

    def residual(self, name: str) -> Initialise:
        """Fills a sublayer's last projection as `normal` does, with the smaller standard deviation."""
        return self._draw(name, self.std / sqrt(2 * self.num_layers) / self._wider(name))

    def adapter(self, name: str) -> Initialise:
        """Fills a matrix of the adapters of vectors as `normal` does; the one that predicts starts at 0."""
        return _zero if name.endswith(".leave") else self.normal(name)

    def _wider(self, name: str) -> float:
        """The divisor by which a layer's standard deviation follows the width."""
        return {"outer": 1.0, "hidden": sqrt(self.width_ratio), "router": self.width_ratio}[width_role(name)]

    def depth_router(self, name: str, *, zero: bool) -> Callable[[Tensor], Tensor]:
        """Fills a router's vector: with 0, or so that scores, which are divided by its length, have a
        standard deviation of 0.1."""

        def fill(weight: Tensor) -> Tensor:
            # No tower: every modality has a router, and a name, of its own.
            return weight.zero_() if zero else self._draw(name, 0.1 * sqrt(weight.shape[0]))(weight, "")

        return fill

    def each(self, draw: Callable[[str], Initialise], name: str) -> Initialise:
        """`draw` (normal or residual) for a weight, or for each of a stack of experts' weights by itself.

        Experts start apart, as in Switch and expert choice: of equal ones only the gates tell which token is
        whose, and they part slowly. The first is what the tower would have without experts.
        """

        def fill(weight: Tensor, shard: str) -> None:
            for expert, matrix in enumerate(weight if weight.ndim == 3 else weight[None]):
                draw(f"{name}.{expert}" if expert else name)(matrix, shard)

        return fill

    def _draw(self, name: str, std: float) -> Initialise:
        def fill(weight: Tensor, shard: str) -> Tensor:
            drawn = f"{name}/{shard}" if shard in self.apart else name
            digest = hashlib.sha256(f"{self.seed}/{drawn}".encode()).digest()
            seed = int.from_bytes(digest[:8], "little") >> 1  # torch takes 63 bits
            with torch.no_grad():
                return weight.normal_(0.0, std, generator=torch.Generator().manual_seed(seed))

        return fill


def _zero(weight: Tensor, shard: str) -> Tensor:
    with torch.no_grad():
        return weight.zero_()
