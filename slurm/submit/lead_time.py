"""A warning if a run cannot save in the time that Slurm gives it to stop, by the times of earlier attempts.

This module imports no torch.
"""

import math
from collections.abc import Iterator

from pretrain.checkpoint.folder import MANIFEST, checkpoints
from pretrain.config import RunConfig
from pretrain.metrics import read_rows
from pretrain.run_files import CHECKPOINTS, METRICS
from slurm.commands import kill_wait_s
from slurm.profile import Profile
from slurm.records import read_json

UNPUNCTUAL_S = 60
"""Slurm sends a signal up to a minute early, and checks time limits at intervals."""


def warning(config: RunConfig, profile: Profile) -> str | None:
    """What to change, in words, if ranks may be killed before they have saved.

    It is None if there is time enough, or if nothing has been measured yet. Ranks obey a signal after the
    current step and evaluation, and begin a checkpoint after the previous one is written. The limit is twice
    the time that this took, because the rows of metrics.jsonl hold means over steps and file systems vary.
    """
    rows = read_rows(config.run_dir / METRICS)
    step_s = max(
        (row.get("time/step_s", 0.0) + row.get("time/data_wait_s", 0.0) for row in rows), default=0.0
    )
    if not step_s:
        return None
    evaluation_s = max((row.get("time/eval_s", 0.0) for row in rows), default=0.0)
    checkpoint_s = max(_checkpoint_seconds(config), default=0.0)
    needed_s = UNPUNCTUAL_S + 2 * (step_s + evaluation_s + checkpoint_s)
    took = (
        f"earlier attempts took up to {step_s:.1f} s a step, {evaluation_s:.1f} s an evaluation and "
        f"{checkpoint_s:.1f} s a checkpoint"
    )
    warnings = []
    if profile.signal_lead_s < needed_s:
        warnings.append(
            f"signal_lead_s = {profile.signal_lead_s} may be too short to save before the time limit: "
            f"{took}; {UNPUNCTUAL_S} s + 2 x their sum is {needed_s:.0f} s: set signal_lead_s = "
            f"{10 * math.ceil(needed_s / 10)} in the profile"
        )
    wait_s = kill_wait_s()
    if wait_s is not None and wait_s < step_s + checkpoint_s:
        warnings.append(
            f"at scancel and preemption Slurm kills ranks after KillWait = {wait_s} s, but {took}: the steps "
            "since the last checkpoint would be lost; save more often (every_steps.checkpoint)"
        )
    return "\n".join(warnings) or None


def _checkpoint_seconds(config: RunConfig) -> Iterator[float]:
    for _, path in checkpoints(config.run_dir / CHECKPOINTS):
        yield float(read_json(path / MANIFEST).get("seconds", 0.0))
