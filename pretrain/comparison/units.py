"""Units of held-out losses: what a number of a modality means."""

from collections.abc import Iterable

from pretrain.comparison.foreign.question import Plan

NATS = "nats per token"
SQUARED_ERROR = "mean squared error"
"""Of what is predicted of an image's vectors, per number, averaged over images."""


def unit_of(plan: Plan, modality: str) -> str:
    """The unit of the loss of a modality."""
    return SQUARED_ERROR if modality in plan.vector_modalities else NATS


def units_of(plan: Plan, modalities: Iterable[str]) -> str:
    """The unit of losses of several modalities, with those of another one named."""
    other = [modality for modality in modalities if modality in plan.vector_modalities]
    return f"{NATS} ({', '.join(other)}: {SQUARED_ERROR})" if other else NATS
