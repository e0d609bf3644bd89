"""A word about a run whose loss stays above its start: it learns nothing, and says so early. Imports no
torch."""

from collections.abc import Sequence
from statistics import fmean

FIRST_ROWS = 3
"""Rows of metrics whose mean loss is the start: one row alone may be low by chance."""
ROWS_ABOVE = 20
"""Newest rows that all lie above the start. A warm-up of weights that were trained before may rise for a
few."""


def stays_above_start(losses: Sequence[float]) -> bool:
    """Whether each of the last ROWS_ABOVE rows has a higher loss than the first FIRST_ROWS had on average.

    `losses`: the training loss of every row of the run, in nats/token, oldest first.
    """
    if len(losses) < FIRST_ROWS + ROWS_ABOVE:
        return False
    return min(losses[-ROWS_ABOVE:]) > fmean(losses[:FIRST_ROWS])


def warning(losses: Sequence[float], step: int) -> str:
    """The line for the terminal and the log."""
    start, now = fmean(losses[:FIRST_ROWS]), fmean(losses[-ROWS_ABOVE:])
    return (
        f"warning: step {step}: the training loss has stayed above its start for {ROWS_ABOVE} rows of "
        f"metrics: {now:.4g} nats/token on average, {start:.4g} at the start; lower optimizer.learning_rate?"
    )
