import pytest
from pydantic import ValidationError

from pretrain.models.vectors_config import VectorsConfig


@pytest.mark.parametrize(
    ("keys", "predicted", "learns"),
    [
        ({}, "epsilon", True),
        ({"prediction": "v"}, "v", True),
        ({"objective": "flow", "times": "logit_normal", "shift": 4.0}, "velocity", True),
        ({"objective": "none"}, "epsilon", False),
    ],
)
def test_what_is_predicted(keys: dict, predicted: str, learns: bool) -> None:
    config = VectorsConfig.model_validate({"features": 8, **keys})
    assert (config.predicted, config.learns) == (predicted, learns)
    assert VectorsConfig.model_validate(config.model_dump(mode="json")) == config  # as a run keeps it


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"features": 0}, "features"),
        ({"objective": "flow", "prediction": "v"}, 'prediction = "v" is of objective = "diffusion"'),
        ({"objective": "none", "shift": 2.0, "times": "logit_normal"}, "so shift, times would do nothing"),
        ({"condition_max_time": 0.0}, "condition_max_time"),
        ({"shift": float("inf")}, "shift"),
        ({"adapter": "unet"}, "adapter"),
    ],
)
def test_keys_that_do_nothing_are_refused(keys: dict, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        VectorsConfig.model_validate({"features": 8, **keys})
