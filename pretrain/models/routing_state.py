"""What a forward pass chooses tokens by, beside the weights of its routers."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class RoutingState:
    """Thresholds and schedule by which routers choose tokens; one value for all micro-batches of a step."""

    causal: bool = False
    """Choose by thresholds whatever the rule: how a model whose rule looks at later tokens is evaluated."""
    own_depth_rule: bool = False
    """With `causal`: depth routers choose by their own rule all the same, and experts alone by thresholds. A
    prompt may be read so, for all of its tokens are there."""
    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Name of a depth router ("blocks.3.depth.image") or of an expert ("blocks.3.experts.text.0") -> least
    score that it lets through. A router without a threshold lets every token through."""
    progress: float = 1.0
    """Share of the run that is done: it tells where in their warm-up the ratios are."""
