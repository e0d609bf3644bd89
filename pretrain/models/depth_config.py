"""Which share of a modality's tokens runs in each layer, and how those are chosen. Imports no torch.

Mixture-of-Depths (MoD, Raposo et al. 2024, arXiv 2404.02258) lets k tokens of a sequence through a block and
passes the others by. p-MoD (arXiv 2412.04449; code at MCG-NJU/p-MoD 459f6df) does so with image tokens, and
with fewer of them the deeper the layer. Both choose the k highest scores of a sequence, which looks at later
tokens. The rule "threshold" does not: it compares each score with a running quantile of all of them
(Expert Threshold, arXiv 2603.11535, for depth instead of experts).
"""

import math
from functools import lru_cache
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

Schedule = Literal["constant", "alternating", "stepped", "linear", "cosine", "bathtub"]
Rule = Literal["top_k", "threshold"]
Gate = Literal["tanh", "sigmoid", "softmax", "shifted_softmax", "none"]


class DepthBlockConfig(BaseModel):
    """Table `model.depth_block`: how a block with depth routers treats the tokens of all modalities."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    renamed: ClassVar[dict[str, str]] = {
        "scale=string": "all",
        "scale=string_code": "all_as_released",
    }

    scale: Literal["selected", "all", "all_as_released"] = "selected"
    """Where the gate g acts. With T the block: selected (MoD): x + g (T(x) - x) for tokens that run, x for
    others. all (p-MoD's figure): g T(x) and g x. all_as_released (p-MoD's code): a + g FFN(a) with a = x +
    Attention(x), and g x."""
    parts: Literal["attention+feed_forward", "feed_forward"] = "attention+feed_forward"
    """What tokens may skip."""
    keys: Literal["all", "selected"] = "all"
    """Tokens that attention can look at: all, or as in both papers those that run."""

    @model_validator(mode="after")
    def _check(self) -> "DepthBlockConfig":
        if self.parts == "feed_forward" and self.keys == "selected":
            raise ValueError(
                'keys = "selected" with parts = "feed_forward": attention then runs for all tokens; set keys '
                '= "all", or parts = "attention+feed_forward"'
            )
        return self


class DepthConfig(BaseModel):
    """Table `model.depth.<modality>`: which of the modality's tokens run in which layer.

    A layer has a ratio: the share of the modality's tokens that run in it; or it is dense and has no router.
    Special tokens (<bos>, <boi> and the like) always run, padding never, and neither counts in the ratio.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    moved: ClassVar[dict[str, str]] = {key: f"model.depth_block.{key}" for key in ("scale", "parts", "keys")}

    schedule: Schedule
    """Ratio over the layers; L of them after dense_first and dense_last, l = 0 ... L - 1, shifted by one
    number so that the mean is mean_ratio. constant; alternating: every second layer, the first dense (MoD);
    linear: 1/2 - l / (L - 1); cosine: cos(pi l / (L - 1)) / 2 (p-MoD's progressive ratio decay); stepped: the
    linear one in `steps` steps; bathtub: cos(2 pi (l + 1/2) / L) / 2, for modalities that are predicted."""
    mean_ratio: float = Field(gt=0, le=1)
    """Of all layers of the model, the dense ones counted with 1."""
    min_ratio: float = Field(0.15, gt=0, le=1)
    """No layer has less (p-MoD: 0.15)."""
    dense_above: float = Field(0.85, ge=0, le=1)
    """A layer that would have more is dense (p-MoD: 0.85). 1: every layer of the schedule has a router."""
    steps: int = Field(4, ge=2)
    """Of the stepped schedule."""
    dense_first: NonNegativeInt = 0
    """First layers that are dense whatever the schedule."""
    dense_last: NonNegativeInt = 0
    rule: Rule
    """top_k: of each document the trunc(ratio n) tokens of highest score, the earlier of equals. Sees later
    tokens. threshold: scores of at least a running quantile that is constant within a step. Causal."""
    threshold_momentum: float = Field(0.4, ge=0, lt=1)
    """Share of the old threshold in the new one. More of it evens out small batches and takes longer to pay
    back what was let through too much (pretrain/train/thresholds.py). demo_pmod.toml at twice its learning
    rate, 300 image tokens a step: means over steps 200 to 300 are within 0.005 of the six wanted shares at
    0.4; without paying back they were off by up to 0.083."""
    gate: Gate = "tanh"
    """What a token's score r makes of it. tanh: 1 + alpha tanh r (p-MoD's TanhNorm); sigmoid (MoMa, arXiv
    2407.21770); softmax: over the modality's tokens of the document, not causal; shifted_softmax: 1 + that;
    none: 1, so that the router learns nothing."""
    alpha: float = Field(0.2, gt=0, lt=1)
    """Of the tanh gate (p-MoD: 0.2)."""
    zero_init: bool = False
    """Routers start at 0, so that every tanh gate is 1 (p-MoD's way into a trained model). Otherwise so
    that scores have a standard deviation of 0.1."""
    dense_frac: float = Field(0.02, ge=0, le=1)
    """Share of the run at its start in which all tokens run, their gates active."""
    ramp_frac: float = Field(0.08, ge=0, le=1)
    """Share of the run after it, over which ratios fall linearly from 1."""

    @model_validator(mode="after")
    def _check(self) -> "DepthConfig":
        if self.zero_init and self.rule == "threshold":
            raise ValueError(
                'zero_init = true with rule = "threshold": equal scores lie all on one side of any '
                'threshold; set zero_init = false (gates then start within 2 % of 1), or rule = "top_k"'
            )
        if self.dense_frac + self.ramp_frac > 1:
            raise ValueError(
                f"dense_frac = {self.dense_frac} and ramp_frac = {self.ramp_frac} are more than the run; "
                "their sum may be 1"
            )
        return self

    @property
    def is_causal(self) -> bool:
        """Whether no token's result depends on later tokens."""
        return self.rule == "threshold" and self.has_causal_gate

    @property
    def has_causal_gate(self) -> bool:
        return self.gate not in ("softmax", "shifted_softmax")

    def ratios(self, num_layers: int) -> tuple[float | None, ...]:
        """Ratio of each layer at the end of warm-up; None: dense. Their mean is mean_ratio.

        Raises ValueError, with the means that can be had, where it cannot be.
        """
        return _ratios(self, num_layers)[0]  # pyright: ignore[reportArgumentType]

    def routed_layers(self, num_layers: int) -> int:
        """The number of layers with a router."""
        return _ratios(self, num_layers)[1]  # pyright: ignore[reportArgumentType]

    def ratio_at(self, ratio: float, progress: float) -> float:
        """The ratio of a layer whose ratio after warm-up is `ratio`, at `progress` (0 to 1) of the run."""
        if progress < self.dense_frac:
            return 1.0
        if progress >= self.dense_frac + self.ramp_frac:
            return ratio
        return 1 - (1 - ratio) * (progress - self.dense_frac) / self.ramp_frac


# Cached, here and below: every optimizer step asks for the ratios of all layers, several times. Frozen models
# of pydantic have a hash, which pyright does not know.
@lru_cache
def _ratios(depth: DepthConfig, num_layers: int) -> tuple[tuple[float | None, ...], int]:
    """The results of `DepthConfig.ratios` and of `routed_layers`."""
    dense_first, dense_last, mean_ratio = depth.dense_first, depth.dense_last, depth.mean_ratio
    between = num_layers - dense_first - dense_last
    if between < 1:
        raise ValueError(
            f"dense_first = {dense_first} and dense_last = {dense_last} leave none of "
            f"num_layers = {num_layers} to route; set them lower"
        )
    shape = _shape(depth.schedule, between, depth.steps)
    routed = sum(value is not None for value in shape)
    lowest = (num_layers - routed + routed * depth.min_ratio) / num_layers
    if mean_ratio < lowest - 1e-9 or (not routed and mean_ratio < 1):
        raise ValueError(
            f'mean_ratio = {mean_ratio} cannot be had: schedule = "{depth.schedule}" with '
            f"min_ratio = {depth.min_ratio} and {num_layers - routed} of num_layers = {num_layers} dense "
            f"whatever it is has means from {lowest:.4g} to 1; set mean_ratio in that range, or "
            "min_ratio lower"
        )
    wanted = mean_ratio * num_layers - (num_layers - between)
    found = _shifted(shape, wanted, depth.min_ratio, depth.dense_above)
    return (None,) * dense_first + found + (None,) * dense_last, between - found.count(None)


@lru_cache
def _shape(schedule: Schedule, layers: int, steps: int) -> tuple[float | None, ...]:
    """The schedule before it is shifted; None: a layer that is always dense."""

    def linear(layer: int, of: int) -> float:
        return 0.5 - layer / max(1, of - 1)

    def at(layer: int) -> float | None:
        match schedule:
            case "constant":
                return 0.0
            case "alternating":
                return 0.0 if layer % 2 else None
            case "linear":
                return linear(layer, layers)
            case "stepped":
                return linear(layer * steps // layers, steps)
            case "cosine":
                return 0.5 * math.cos(math.pi * layer / max(1, layers - 1))
            case "bathtub":
                return 0.5 * math.cos(2 * math.pi * (layer + 0.5) / layers)

    # Rounded, so that layers which should be equal are.
    return tuple(None if (value := at(layer)) is None else round(value, 12) for layer in range(layers))


@lru_cache
def _shifted(
    shape: tuple[float | None, ...], wanted: float, lowest: float, dense_above: float
) -> tuple[float | None, ...]:
    """Ratios max(shape + shift, lowest), None above `dense_above`, of which the sum is `wanted`.

    The sum jumps where a layer becomes dense; between two such sums the layers that are next to become so
    have what is missing, and so more than `dense_above`.
    """

    import numpy as np  # here, because most models have no depth routing and are described without NumPy

    known = np.array([np.inf if value is None else value for value in shape])

    def total(shift: float) -> float:
        moved = np.clip(known + shift, lowest, 1.0)
        dense_as_1 = np.where(moved > dense_above + 1e-9, 1.0, moved)
        return float(np.cumsum(dense_as_1)[-1])  # added in the order of layers, unlike np.sum

    low, high = -2.0, 2.0
    while low < (middle := (low + high) / 2) < high:  # until no number lies between
        low, high = (middle, high) if total(middle) <= wanted + 1e-13 else (low, middle)
    moved = [None if value is None else min(max(value + low, lowest), 1.0) for value in shape]
    found = [None if value is None or value > dense_above + 1e-9 else value for value in moved]
    missing = wanted - total(low)
    if missing > 1e-9:
        highest = max(value for value in found if value is not None)
        next_to = [i for i, value in enumerate(found) if value is not None and value > highest - 1e-9]
        for i in next_to:
            found[i] = highest + missing / len(next_to)
    return tuple(None if value is None else min(1.0, round(value, 12)) for value in found)
