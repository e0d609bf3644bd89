"""s of Mixture-of-Transformers as published (Liang et al., arXiv 2411.04996v2), to stand beside a ladder's.

The numbers are those in the legends of the paper's figures. The paper does not say how s was fitted or
smoothed. Its held-out losses are of Obelics. Parameters are without embedding and head: layers x (4 d^2 + 3 d
ffn_hidden), which with the paper's vocabulary gives the sizes of its labels. This module imports no torch.
"""

from dataclasses import dataclass

from pretrain.comparison.plan import ComparisonPlan


@dataclass(frozen=True)
class PublishedShare:
    """s of MoT against dense at one size and in one modality."""

    size: str
    """The paper's label."""
    parameters: float
    """Parameters that a token meets, embedding and head left out."""
    modality: str
    s: float
    what: str
    """Which loss, and the figure that shows it."""


PARAMETERS = {
    "37M": 3.4e6,
    "94M": 27.3e6,
    "443M": 308.3e6,
    "880M": 679.5e6,
    "1.5B": 1233.1e6,
    "7B": 6476.0e6,
}
_HELD_OUT = "Chameleon with speech, held-out, Fig. 25"
_TRAINING = "Chameleon with speech, training, Fig. 9"
_SHARES = {
    ("image", _HELD_OUT): {
        "37M": 0.227,
        "94M": 0.210,
        "443M": 0.282,
        "880M": 0.343,
        "1.5B": 0.369,
        "7B": 0.402,
    },
    ("text", _HELD_OUT): {
        "37M": 0.528,
        "94M": 0.549,
        "443M": 0.577,
        "880M": 0.606,
        "1.5B": 0.636,
        "7B": 0.536,
    },
    ("speech", _TRAINING): {"443M": 0.151, "880M": 0.194, "1.5B": 0.199},
}
PUBLISHED = tuple(
    PublishedShare(size, PARAMETERS[size], modality, s, what)
    for (modality, what), by_size in _SHARES.items()
    for size, s in by_size.items()
)
TOKENS_PER_PARAMETER = (58, 74_000)
"""Training tokens per such parameter at 7B and at 37M, by the paper's Table 1 (text and image)."""


def is_published_mot(plan: ComparisonPlan, arm: str) -> bool:
    """Whether an arm is what the paper calls MoT, so that the paper's numbers may stand beside it: a tower
    per modality, without experts and depth routing, against a baseline of one tower."""
    models = {run.arm: run.config.model for run in plan.runs}
    model, base = models[arm], models[plan.config.baseline]
    plain = not (model.experts or model.depth or base.experts or base.depth)
    return plain and len(model.tower_names) == len(model.towers) and len(base.tower_names) == 1
