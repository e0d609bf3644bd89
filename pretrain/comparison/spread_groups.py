"""Spreads over seeds that differ between groups of arms, such as all arms of one size. Imports no torch."""

from collections.abc import Hashable, Sequence

import numpy as np
from jaxtyping import Float
from scipy import stats

from pretrain.comparison.simultaneous import (
    SPREADS_DIFFER_P,
    Array,
    Design,
    OverDocuments,
    arm_variances,
    half_width,
)


def group_half_widths(
    losses: Float[Array, "outcomes runs"],
    design: Design,
    groups: Sequence[Hashable],
    level: float,
    documents: OverDocuments | None = None,
) -> Float[Array, "outcomes contrasts"]:
    """Half widths at a local level from the variance over runs of each group; 0 where no group spreads far.

    `groups`: the group of every arm of the design. A group spreads far if p of the one-sided F test of its
    variance against that of all other groups is below SPREADS_DIFFER_P. A contrast within one group has the
    group's degrees of freedom, one between groups those of Satterthwaite. With `documents` the intervals hold
    what other documents would change too.
    """
    names = list(dict.fromkeys(groups))
    member = np.eye(len(names))[[names.index(group) for group in groups]]
    variances, dof = arm_variances(losses, design)
    squares, group_dof = np.where(dof > 0, variances * dof, 0.0) @ member, dof @ member
    others, others_dof = squares.sum(axis=1, keepdims=True) - squares, group_dof.sum() - group_dof
    with np.errstate(divide="ignore", invalid="ignore"):
        p = stats.f.sf(squares / group_dof / (others / others_dof), group_dof, others_dof)
        far = (p < SPREADS_DIFFER_P) & (others_dof > 0)
        per_group = np.nan_to_num(squares / group_dof)
        unit = (design.weights**2 / design.num_runs) @ member
        parts = per_group[:, None, :] * unit
        total = parts.sum(axis=2)
        satterthwaite = np.nan_to_num(total**2 / np.nan_to_num(parts**2 / group_dof).sum(axis=2), nan=1.0)
    concerned = far.astype(float) @ (unit > 0).T > 0
    half = half_width(np.sqrt(total), satterthwaite, level, documents)
    return np.where(concerned, half, 0.0)
