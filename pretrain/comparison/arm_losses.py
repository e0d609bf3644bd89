"""The final held-out losses of an arm over its seeds, from curves or from documents.

This module imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float

from data_pipeline.files.toml_config import ConfigError
from pretrain.comparison.results import Curve, aligned


@dataclass(frozen=True)
class ArmLoss:
    """Final held-out losses of an arm in a modality or direction, over the seeds."""

    per_seed: tuple[float, ...]
    mean: float
    deviation: float | None
    """Standard deviation over the seeds; None with one seed."""
    best: float
    best_tokens: float
    """Tokens at which the mean loss was lowest (`best`): before the end if the arm has begun to overfit."""
    risen_frac: float
    """Share of `best` by which the mean curve ends above it."""


def aligned_arm(arm: str, curves: Sequence[Curve]) -> tuple[Curve, ...]:
    """The curves of an arm's runs at their common steps. Raises ConfigError if there are none."""
    common = aligned(curves)
    if not len(common[0]):
        raise ConfigError(
            f"{arm}: its runs were evaluated at no common step, so it has no curve; evaluate all seeds at "
            "the same steps, at least at the last one"
        )
    return common


def arm_loss(curves: Sequence[Curve]) -> ArmLoss:
    """The losses of an arm at the end of the curves of its runs."""
    final = tuple(float(c.values[-1]) for c in curves)
    mean_curve = np.mean([c.values for c in curves], axis=0)
    best = int(np.argmin(mean_curve))
    return ArmLoss(
        per_seed=final,
        mean=float(np.mean(final)),
        deviation=float(np.std(final, ddof=1)) if len(final) > 1 else None,
        best=float(mean_curve[best]),
        best_tokens=float(curves[0].tokens[best]),
        risen_frac=float(mean_curve[-1] / mean_curve[best]) - 1,
    )


def with_documents(of_curves: ArmLoss, final: Float[np.ndarray, " runs"]) -> ArmLoss:
    """The losses of an arm over the documents of the last evaluation, with the lowest point of its curve."""
    deviation = float(final.std(ddof=1)) if len(final) > 1 else None
    return replace(of_curves, per_seed=tuple(final.tolist()), mean=float(final.mean()), deviation=deviation)
