"""Contrasts of a comparison: which differences between arms are estimated, and which of them are verdicts.

A contrast is a difference of two arms, or an interaction: a difference of two differences. The contrast of an
arm with the baseline has the arm's name. This module imports no torch.
"""

import re
from collections.abc import Mapping, Sequence

from pretrain.quantities import MINUS

Pair = tuple[str, str]
Difference = Pair | tuple[Pair, Pair]
"""(a, b) is a minus b; ((a, b), (c, d)) is (a minus b) minus (c minus d)."""


def weights(difference: Difference) -> dict[str, int]:
    """The weight of every arm in a difference; arms that cancel are left out."""
    first, second = difference
    if isinstance(first, str) or isinstance(second, str):
        signed = ((str(first), 1), (str(second), -1))
    else:
        signed = ((first[0], 1), (first[1], -1), (second[0], -1), (second[1], 1))
    out: dict[str, int] = {}
    for arm, weight in signed:
        out[arm] = out.get(arm, 0) + weight
    return {arm: weight for arm, weight in out.items() if weight}


def difference_text(difference: Difference) -> str:
    """ "a - b", or "(a - b) - (c - d)"."""
    first, second = difference
    if isinstance(first, str) or isinstance(second, str):
        return f"{first} {MINUS} {second}"
    return f"({difference_text(first)}) {MINUS} ({difference_text(second)})"


def all_differences(
    arms: Sequence[str], baseline: str, named: Mapping[str, Difference]
) -> dict[str, Difference]:
    """All contrasts by name: every arm but the baseline with the baseline, then those that the file names."""
    return {arm: (arm, baseline) for arm in arms if arm != baseline} | dict(named)


def verdict_names(arms: Sequence[str], baseline: str, primary: tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of the primary contrasts; without a list of them, those of all arms with the baseline."""
    return tuple(arm for arm in arms if arm != baseline) if primary is None else primary


def without_arms(
    differences: Mapping[str, Difference], verdicts: Sequence[str], arms: Sequence[str]
) -> tuple[set[str], tuple[str, ...]]:
    """(names of contrasts that some arms take part in, verdicts that are left without them)."""
    gone = {name for name, difference in differences.items() if set(weights(difference)) & set(arms)}
    return gone, tuple(name for name in verdicts if name not in gone)


def check_contrasts(
    arms: Sequence[str],
    baseline: str,
    named: Mapping[str, Difference],
    primary: Sequence[str] | None,
    pattern: str,
) -> None:
    """Raise ValueError for a contrast that cannot be estimated or is there twice, or an unknown primary."""
    known = {frozenset(weights(d).items()): n for n, d in all_differences(arms, baseline, {}).items()}
    for name, difference in named.items():
        if name in arms or not re.fullmatch(pattern, name):
            raise ValueError(
                f'contrasts."{name}": use letters, digits, "_", "-" and ".", and no name of an arm, which '
                "stands for the contrast of that arm with the baseline"
            )
        parts = weights(difference)
        if unknown := [arm for arm in parts if arm not in arms]:
            raise ValueError(f'contrasts.{name}: "{unknown[0]}" is no arm; arms: {", ".join(arms)}')
        if not parts:
            raise ValueError(f"contrasts.{name}: {difference_text(difference)} is always 0")
        for key in (frozenset(parts.items()), frozenset((a, -w) for a, w in parts.items())):
            if key in known:
                raise ValueError(f'contrasts.{name} is the contrast "{known[key]}" again; take it out')
        known[frozenset(parts.items())] = name
    choices = list(all_differences(arms, baseline, named))
    if primary is not None:
        for name in primary:
            if name not in choices:
                raise ValueError(f'primary: "{name}" is no contrast; contrasts: {", ".join(choices)}')
        if len(set(primary)) != len(primary):
            raise ValueError(f"primary = {list(primary)} names a contrast twice")
