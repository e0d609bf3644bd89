"""Caveats about curves along a run: how they match, cross, close and rise. This module imports no torch."""

import math
from collections.abc import Iterator

from pretrain.comparison.caveat import Caveat
from pretrain.comparison.findings import ALL, Contrast, Findings
from pretrain.quantities import format_tokens, join

FEW_POINTS = 8
LATE_FRAC = 0.8
RISEN_FRAC = 0.01
"""Share of its lowest value by which a held-out loss must have risen to be called overfitting."""


def of_matching(findings: Findings) -> Iterator[Caveat]:
    """Caveats about step matching."""
    never = {
        arm: [
            m for m in findings.modalities if findings.contrast(arm, m).never_reached(findings.progress_axis)
        ]
        for arm in findings.plan.others
    }
    if named := [f"{arm} on {join(modalities)}" for arm, modalities in never.items() if modalities]:
        yield Caveat(
            f"Not all losses that {findings.plan.config.baseline} had were reached by {'; '.join(named)}. "
            "Nothing is extrapolated: s is fitted to the others, so there it flatters the arm, and the "
            "end-point ratio is the one to quote."
        )
    schedules = {config.optimizer.schedule.kind for config in findings.plan.run_configs.values()}
    if schedules != {"constant"}:
        yield Caveat(
            "Step matching reads the faster arm in the middle of its learning-rate schedule and the slower "
            "one at its end: it understates what is saved, s under a cosine by 3 to 10 % of s. A run planned "
            "for the shorter length would do better."
        )


def of_curves(findings: Findings) -> Iterator[Caveat]:
    """Caveats about the number of evaluations, late crossings, closing gaps and overfitting."""
    points = min(len(contrast.gap) for contrast in findings.contrasts)
    if points < FEW_POINTS:
        yield Caveat(
            f"{points} evaluations a run (every_steps.eval): crossings and step matching are coarse."
        )
    for arm in findings.plan.others:
        contrasts = [findings.contrast(arm, m) for m in findings.modalities]
        for contrast in contrasts:
            if contrast.crossings and contrast.crossings[-1].x > LATE_FRAC * findings.tokens:
                yield Caveat(
                    f"On {contrast.modality} the curve of {arm} crossed late (at "
                    f"{format_tokens(contrast.crossings[-1].x)} of {format_tokens(findings.tokens)}): a "
                    "longer comparison may say something else.",
                    grave=True,
                )
    closing = {
        arm: [m for m in findings.modalities if _closing(findings.contrast(arm, m))]
        for arm in findings.plan.others
    }
    if named := [f"{arm} on {join(modalities)}" for arm, modalities in closing.items() if modalities]:
        yield Caveat(
            f"The gap of {'; '.join(named)} was closing at the end, fast enough to be gone before four times "
            "as many tokens, were it to go on like that: a longer comparison may say something else."
        )
    for (arm, modality), loss in findings.losses.items():
        if modality != ALL and loss.risen_frac > RISEN_FRAC:
            yield Caveat(
                f"{arm}'s held-out loss on {modality} was lowest at {format_tokens(loss.best_tokens)} "
                f"({loss.best:.3f}) and has risen since: it overfits."
            )


def _closing(contrast: Contrast) -> bool:
    """Whether the gap would close within two more doublings of the tokens, at its late pace."""
    gap, trend = float(contrast.gap[-1]), contrast.trend
    return math.isfinite(trend) and gap * trend < 0 and abs(gap) < 2 * abs(trend)
