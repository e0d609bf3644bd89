"""Facts in what the models of a comparison generate: accuracies by arm, and differences to the baseline.

They are there if evaluate.generate asked for them (pretrain/generation/facts.py). This module imports no
torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.comparison.effects import Effect, effects
from pretrain.comparison.foreign.question import Plan
from pretrain.comparison.results import RunResult
from pretrain.comparison.scope import Scope

PREFIX = "eval/facts/"
KINDS = ("exact", "per_digit")


@dataclass(frozen=True)
class Fact:
    """One accuracy, such as "text_to_image/exact", of the samples of all arms after the last step."""

    name: str
    accuracy: Mapping[str, tuple[float, ...]]
    """Arm -> the accuracy of each of its runs."""
    foreign: Mapping[str, float]
    """Arm -> the mean accuracy of the same samples against the digits of other prompts: what chance gives."""
    judge: float | None
    """The judge's own accuracy on what was not generated, mean over all runs; None: a rule reads."""
    effects: Mapping[str, Effect]
    """Contrast -> its effect, in shares of 1. The intervals of all facts and primary contrasts hold together,
    apart from those of losses."""


def facts_of(plan: Plan, scope: Scope, results: Sequence[RunResult]) -> tuple[Fact, ...]:
    """The facts that every run in scope has measured; none if the comparison did not ask for them."""
    finals = [_final_row(run) for run in results]
    names = [
        name for name in finals[0] if name.rpartition("/")[2] in KINDS and all(name in row for row in finals)
    ]
    if not names:
        return ()
    values = {name: [row[name] for row in finals] for name in names}
    found = effects(
        plan.config,
        [(run.arm, run.seed) for run in results],
        values,
        family=names,
        interim=scope.interim,
        diverged=scope.diverged,
    )

    def by_arm(name: str) -> dict[str, tuple[float, ...]]:
        return {
            arm: tuple(row[name] for run, row in zip(results, finals, strict=True) if run.arm == arm)
            for arm in plan.arms
        }

    facts = []
    for name in names:
        direction, _, kind = name.rpartition("/")
        judge = [row[key] for row in finals if (key := f"{direction}/judge_{kind}") in row]
        foreign = by_arm(f"{direction}/foreign_{kind}")
        facts.append(
            Fact(
                name=name,
                accuracy=by_arm(name),
                foreign={arm: float(np.mean(of_runs)) for arm, of_runs in foreign.items()},
                judge=float(np.mean(judge)) if judge else None,
                effects={contrast: effect for (contrast, of), effect in found.items() if of == name},
            )
        )
    return tuple(facts)


def _final_row(run: RunResult) -> dict[str, float]:
    """The facts of a run's last step, by name without the prefix; empty before it."""
    rows = (row for row in run.rows if row["step"] == run.planned.num_steps)
    return {
        name.removeprefix(PREFIX): float(value)
        for row in rows
        for name, value in row.items()
        if name.startswith(PREFIX)
    }
