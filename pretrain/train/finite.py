"""Stop at the first loss or gradient that is no number, and say where it came from."""

import math
from collections.abc import Sequence

from parallel.engine import StepResult
from parallel.world import World
from pretrain.models import modality_sums
from pretrain.models.inputs import ModelInputs

_SAMPLES_SHOWN = 8


class NonFiniteError(RuntimeError):
    """A step whose loss or gradient is not finite; names step, ranks, modalities and samples."""


def require_finite(
    result: StepResult, inputs: Sequence[ModelInputs], modalities: Sequence[str], *, step: int, world: World
) -> None:
    """Raise NonFiniteError on every rank if step number `step` has a loss or gradient that is no number."""
    if found := not_finite(result, inputs, modalities, world):
        raise NonFiniteError(
            f"step {step} is not finite:\n  " + "\n  ".join(found) + "\n"
            "Nothing was saved after it: starting again continues from the last checkpoint, with the same "
            "data. If it comes back, lower optimizer.learning_rate or look at the samples (under another "
            "name=...)"
        )


def not_finite(
    result: StepResult, inputs: Sequence[ModelInputs], modalities: Sequence[str], world: World
) -> list[str]:
    """Lines that say where a loss or gradient of a step is no number; none if all are. All ranks call it.

    Every rank decides alike, because `result` is alike; then each tells what its own micro-batches show.
    """
    if math.isfinite(result.grad_norm) and all(map(math.isfinite, result.stats)):
        return []
    # Ranks that share a data-parallel coordinate have the same micro-batches: one of the last stage speaks.
    inputs = inputs if result.local_stats and world.tp_rank == 0 else ()
    mine = _bad_losses(result, inputs, modalities, world.rank) if inputs else []
    found = [line for lines in world.gather(mine) for line in lines]
    if not found:
        towers = [name for name, norm in result.grad_norm_by_group.items() if not math.isfinite(norm)]
        found = [f"every loss is finite, but the gradient of {', '.join(towers) or 'the model'} is not"]
        found += [line for lines in world.gather(_samples(inputs, world.rank)) for line in lines]
    return found


def _bad_losses(
    result: StepResult, inputs: Sequence[ModelInputs], modalities: Sequence[str], rank: int
) -> list[str]:
    lines = []
    for number, (stats, micro_batch) in enumerate(zip(result.local_stats, inputs, strict=True)):
        targets = modality_sums.unpack(stats, modalities)
        bad = [f"{m} loss {sums.nats}" for m, sums in targets.items() if not math.isfinite(sums.nats)]
        if bad:
            lines.append(
                f"rank {rank}, micro-batch {number}: {', '.join(bad)}; samples {_names(micro_batch)}"
            )
    return lines


def _samples(inputs: Sequence[ModelInputs], rank: int) -> list[str]:
    return [f"rank {rank}, micro-batch {n}: samples {_names(each)}" for n, each in enumerate(inputs)]


def _names(inputs: ModelInputs) -> str:
    names = [name for sequence in inputs.samples for name in sequence]
    more = f" and {len(names) - _SAMPLES_SHOWN} more" if len(names) > _SAMPLES_SHOWN else ""
    return ", ".join(names[:_SAMPLES_SHOWN]) + more
