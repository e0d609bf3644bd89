from dataclasses import dataclass
from typing import Any, cast

import pytest

from pretrain.comparison.effects import PILOT_DEVIATION
from pretrain.comparison.units import NATS, SQUARED_ERROR, unit_of, units_of


@dataclass(frozen=True)
class PlanOfVectors:
    vector_modalities: tuple[str, ...]


@pytest.mark.parametrize(
    ("vectors", "of_image", "of_both"),
    [((), NATS, NATS), (("image",), SQUARED_ERROR, f"{NATS} (image: {SQUARED_ERROR})")],
)
def test_a_modality_of_vectors_has_a_unit_of_its_own(
    vectors: tuple[str, ...], of_image: str, of_both: str
) -> None:
    plan = cast(Any, PlanOfVectors(vectors))
    assert unit_of(plan, "text") == NATS and unit_of(plan, "image") == of_image
    assert units_of(plan, PILOT_DEVIATION) == of_both
