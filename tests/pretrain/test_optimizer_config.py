import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.optimizer_config import OptimizerConfig


def test_the_spec_is_that_of_the_kind() -> None:
    """What an update computes is tested with its optimizer (tests/parallel)."""
    values = [{"learning_rate": 1e-3, "kind": kind} for kind in ("adamw", "muon")]
    adamw, muon = map(OptimizerConfig.model_validate, values)
    assert (adamw.spec.matrix_states, len(muon.spec.matrix_states)) == ((), 1)
    averaged = adamw.model_copy(update={"ema_decay": 0.9}).spec
    assert set(averaged.states) > set(adamw.spec.states)
    assert [adamw.takes(3), muon.takes(2), muon.takes(3)] == [True, True, False]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"muon": {"qkv": "heads"}}, 'but kind = "adamw"; set kind ='),
        ({"ema_decay": 1.0}, "ema_decay = 1.0"),
        ({"schedule": {"kind": "exponential", "min_factor": 0}}, "equal ratios never reach 0"),
        ({"groups": [{"match": "embedding.*"}]}, '"embedding.*" sets nothing'),
    ],
)
def test_values_that_cannot_be_meant_are_refused(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("*", r"\*").replace("(", r"\(")):
        validate(OptimizerConfig, {"learning_rate": 1e-3, **values}, source="run.toml")
