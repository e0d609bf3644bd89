import pytest
from pydantic import ValidationError

from parallel.layout import ParallelConfig, check_layout


def check(world_size: int = 2, sequences: int = 8, precision: str = "fp32", **values: object) -> None:
    check_layout(
        ParallelConfig.model_validate(values),
        world_size=world_size,
        sequences_per_step=sequences,
        precision=precision,
    )


@pytest.mark.parametrize("values", [{}, {"zero_stage": 3}, {"micro_batch_sequences": 4}, {"zero_stage": 0}])
def test_legal_layouts_pass(values: dict) -> None:
    check(**values)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"world_size": 3}, "multiple of 3"),
        ({"micro_batch_sequences": 8}, "multiple of 16"),
        ({"tp": 2}, "parallel.tp = 2"),
        ({"pp": 2}, "parallel.pp = 2"),
        ({"zero_stage": 0, "precision": "bf16"}, "use zero_stage = 1, 2 or 3"),
    ],
)
def test_illegal_layouts_name_the_values_and_the_fix(values: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check(**values)


@pytest.mark.parametrize("values", [{"zero_stage": 4}, {"tp": 0}, {"micro_batch_sequences": 0}, {"dp": 2}])
def test_impossible_numbers_are_refused(values: dict) -> None:
    with pytest.raises(ValidationError):
        ParallelConfig.model_validate(values)
