"""The learning-rate factor of a step, and how far two configs make the same steps. Imports no torch."""

import math
from typing import NamedTuple

from data_pipeline.files.toml_config import ConfigError
from pretrain.config import RunConfig
from pretrain.optimizer_config import ScheduleConfig


def schedule_factor(step: int, num_steps: int, config: ScheduleConfig) -> float:
    """Factor on the learning rate for the step that `step` others came before, of `num_steps`.

    Warm-up is linear and ends at 1 with its last step; the first step is 1 / warmup_steps, not 0. From there
    cosine, linear and exponential fall to min_factor at the last step; wsd stays at 1 and falls linearly to
    min_factor over the last decay_frac of the steps; constant stays. All of this is of the steps from
    config.start_step on. Raises ConfigError for a step before it: another config made that one.
    """
    assert 0 <= step < num_steps, (step, num_steps)
    if step < config.start_step:
        raise ConfigError(
            f"step {step + 1} comes before optimizer.schedule.start_step = {config.start_step}, where the "
            "schedule of this run begins; put the checkpoint of that step back"
        )
    step, num_steps = step - config.start_step, num_steps - config.start_step
    peak = max(config.warmup_steps - 1, 0)
    last = num_steps - 1
    warm = (step + 1) / config.warmup_steps if step < config.warmup_steps else 1.0
    if config.kind == "constant" or last == 0:
        return warm
    if config.kind != "wsd":
        if step <= peak:
            return warm
        progress = (step - peak) / (last - peak)
        if config.kind == "exponential":
            return config.min_factor**progress
        left = 1 - progress if config.kind == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return config.min_factor + (1 - config.min_factor) * left
    decay_steps = max(1, round(config.decay_frac * num_steps))
    left = min((last - step) / decay_steps, 1.0)
    # min: where the decay begins before the warm-up ends, the factor is never above either.
    return min(warm, config.min_factor + (1 - config.min_factor) * left)


class Difference(NamedTuple):
    """The first step that two configs make in different ways."""

    steps: int
    """Number of steps before it."""
    key: str
    """The table of the run file that tells the step apart."""


def first_difference(one: RunConfig, other: RunConfig, *, until: int) -> Difference | None:
    """The first of `until` steps whose learning-rate factor, or ratio of depth routing, differs between two
    configs; None if there is none. The two differ in total_tokens, optimizer.schedule and the ramps of depth
    routing at most."""
    lengths = one.num_steps, other.num_steps
    last = min(until, *lengths)
    schedules = one.optimizer.schedule, other.optimizer.schedule
    for step in range(schedules[1].start_step, last):
        of_one, of_other = (schedule_factor(step, n, s) for n, s in zip(lengths, schedules, strict=True))
        if of_one != of_other:
            return Difference(step, "optimizer.schedule")
    for modality, depth in one.model.depth.items():
        depths = depth, other.model.depth[modality]
        for step in range(last + 1):  # thresholds know the ratio of the next step
            ramps = (d.ratio_at(0.0, step / n) for d, n in zip(depths, lengths, strict=True))
            if not math.isclose(*ramps, rel_tol=0, abs_tol=_SAME_RAMP):
                return Difference(step, f"model.depth.{modality}")
    return None


_SAME_RAMP = 1e-9
"""A ramp whose share of a longer run was made smaller ends at the same step; its quotients round apart."""
