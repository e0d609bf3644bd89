"""What a spike is, and what it costs. A spike is a step whose loss or gradient norm is not finite, or leaps
above those of the steps before it. Imports no torch.

    on_spike    weights, optimizer states, thresholds    data of the step
    stop        the run ends                             is read again by the next attempt
    skip        stay as they are                         counts as consumed
    rollback    those of the last checkpoint             counts as consumed, as that of all steps since then

After a rollback the steps since the checkpoint are made again on the data behind the spike, as PaLM did
(arXiv 2204.02311, section 5.1): with the same data they would be the same steps. The position in the data,
and with it the fingerprint, therefore never goes back.

A spike is decided from numbers that all ranks share, so all decide alike, and a run that is killed and
started again meets the same spikes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from pretrain.config import RunConfig, SpikeConfig
from pretrain.metrics import SPENT, Sums
from pretrain.models import modality_sums

if TYPE_CHECKING:
    from parallel.engine import StepResult

Measured = tuple[float, float]
"""(loss that the step minimised, in nats/token; norm of its gradient before clipping)."""


@dataclass(frozen=True)
class Spike:
    """A step that was a spike and did not end the run, as state.json and record.json keep it."""

    step: int
    """The number of the step; a run that goes back may have several spikes of one number."""
    why: str
    back_to: int | None
    """The step of the checkpoint that the run went back to; None: it left the update out and went on."""


class SpikeError(RuntimeError):
    """A spike that ends the run; names the step and what leapt."""


def objective(stats: Sequence[float], config: RunConfig) -> float:
    """The mean loss of a step, weighted as the objective weighs modalities. z-loss and auxiliary losses are
    no part of it.

    `stats`: see pretrain/models/modality_sums.py. nan if one of them is not finite.
    """
    if not all(map(math.isfinite, stats)):
        return math.nan
    targets = modality_sums.unpack(stats, config.model.modalities)
    value = modality_sums.objective(targets, config.image_weights, config.loss_weights)
    assert value is not None, "a step without a target"
    return value


def leap(measured: Measured, recent: Sequence[Measured], config: SpikeConfig) -> str | None:
    """Why a step is a spike, as a clause; None for a step that is none. `recent`: of the last config.window
    steps that were applied before it; fewer say nothing about a leap."""
    if not all(map(math.isfinite, measured)):
        return "its loss or gradient is not finite"
    if len(recent) < config.window:
        return None
    factors = (config.loss_factor, config.norm_factor)
    names = ("loss", "gradient norm")
    for name, factor, now, before in zip(names, factors, measured, zip(*recent, strict=True), strict=True):
        usual = median(before)
        if factor is not None and now > factor * usual:
            return (
                f"its {name} of {now:.4g} is more than {factor:g} times the median of the last "
                f"{config.window} steps, {usual:.4g}"
            )
    return None


def refusal(config: RunConfig, recent: Sequence[Measured]) -> Callable[[Sequence[float], float], bool] | None:
    """What refuses the update of a spike (parallel.engine.Refuse); None if a spike ends the run, which then
    keeps nothing of the step."""
    if config.on_spike == "stop":
        return None
    return lambda stats, grad_norm: bool(leap((objective(stats, config), grad_norm), recent, config.spike))


def leap_of(config: RunConfig, recent: Sequence[Measured], result: "StepResult") -> str | None:
    """Why a step that was made is a spike, as `leap` says it; None for one that is none."""
    return leap((objective(result.stats, config), result.grad_norm), recent, config.spike)


def remember(config: RunConfig, recent: tuple[Measured, ...], result: "StepResult") -> tuple[Measured, ...]:
    """`recent` with a step that was applied, to judge later ones by; empty if no leap is looked for."""
    if config.spike.loss_factor is None and config.spike.norm_factor is None:
        return ()
    measured = objective(result.stats, config), result.grad_norm
    return (*recent, measured)[-config.spike.window :]


def check_allowed(config: RunConfig, step: int, spikes: int, why: str) -> None:
    """Raise SpikeError if spike number `spikes` of the run, at step number `step`, ends it."""
    if config.on_spike == "stop":
        raise SpikeError(
            f"step {step} is a spike: {why}. Nothing was saved after it: starting again continues from the "
            'last checkpoint, with the same data; on_spike = "skip" leaves the step out, "rollback" goes '
            "back to that checkpoint and on with later data"
        )
    if spikes > config.spike.max_spikes:
        raise SpikeError(
            f"step {step} is spike number {spikes} of the run: {why}. spike.max_spikes = "
            f"{config.spike.max_spikes} allows no more; a higher one lets the run go on from its last "
            "checkpoint, but look at the data and at optimizer.learning_rate first"
        )


# --------------------------------------------------------------------------------------------- what is lost

_COSTS = {
    "lost_steps": ("steps",),
    "lost_tokens": ("tokens",),
    "lost_flops": ("flops",),
    "lost_s": ("step_s", "wait_s"),
}
"""Name among the Sums of what spikes lost -> names of the Sums that it is a share of."""


def lost(sums: Mapping[str, float]) -> Sums:
    """The Sums of a step whose update was not applied, from pretrain.metrics.step_sums: what it consumed and
    cost, which is lost, without its losses and norms."""
    spent = {name: sums[name] for name in SPENT}
    return spent | {name: sum(spent[part] for part in parts) for name, parts in _COSTS.items()}


def taken_back(spent: Mapping[str, float], saved: Mapping[str, float]) -> Sums:
    """The Sums since step 0 of a run that has the sums `spent` and goes back to the sums `saved`: what it did
    since then stays spent, and is lost. Losses and norms are those of `saved`."""
    sums = dict(saved) | {name: spent[name] for name in SPENT}
    for name, parts in _COSTS.items():
        useful = sum(saved.get(part, 0.0) for part in parts) - saved.get(name, 0.0)
        sums[name] = sum(spent[part] for part in parts) - useful
    return sums


def lost_row(total: Mapping[str, float]) -> dict[str, float]:
    """What spikes lost, by names of metrics. `total`: sums since step 0."""
    return {
        "train/lost_steps": int(total.get("lost_steps", 0.0)),
        "train/lost_tokens": int(total.get("lost_tokens", 0.0)),
        "compute/lost_flops": total.get("lost_flops", 0.0),
        "time/lost_s": total.get("lost_s", 0.0),
    }
