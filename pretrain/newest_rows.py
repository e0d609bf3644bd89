"""The newest rows of a run's metrics.jsonl, which may be growing. This module imports no torch."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_TAIL_BYTES = 1 << 16
_HELD_OUT = {"eval/loss": "", "eval/causal/loss": "causal "}
"""By name of a loss over all held-out targets, the word that tells its rule of choosing tokens."""


def rows_from_end(metrics: Path) -> Iterator[dict[str, Any]]:
    """The whole rows in the last 64 KiB of a metrics.jsonl, newest first."""
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                yield row


def last_row(metrics: Path) -> dict[str, Any]:
    """The last whole row of a metrics.jsonl; {} if there is none."""
    return next(rows_from_end(metrics), {})


def heldout_text(metrics: Path) -> str | None:
    """The newest held-out losses of a run and their step, as text; None if none is among its newest rows.

    A run whose rules look ahead has its causal losses beside the others.
    """
    row = next((row for row in rows_from_end(metrics) if "eval/loss" in row), None)
    if row is None:
        return None
    parts = [f"{word}{_losses(row, name)}" for name, word in _HELD_OUT.items() if name in row]
    return f"{', '.join(parts)} nats/token at step {row['step']:,}"


def _losses(row: Mapping[str, Any], name: str) -> str:
    """A loss over all targets and that of every modality, such as "2.4470 (text 2.9163, image 1.2847)"."""
    own = [key for key in row if key.startswith(f"{name}/") and "_to_" not in key and "/time_" not in key]
    parts = [f"{key.removeprefix(f'{name}/')} {row[key]:.4f}" for key in own]
    return f"{row[name]:.4f}" + (f" ({', '.join(parts)})" if parts else "")
