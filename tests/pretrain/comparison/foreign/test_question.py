"""The question that is put to foreign runs."""

from typing import Any

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.comparison.foreign.question import ForeignConfig

SOUND: dict[str, Any] = {"name": "runs", "arms": ["dense", "mot", "moe"], "baseline": "dense"}


def test_contrasts_are_named_as_in_a_comparison_file() -> None:
    more = {"contrasts": {"sparse": ["mot", "moe"]}, "primary": ["sparse"]}
    config = validate(ForeignConfig, SOUND | more, source="question.toml")
    assert config.differences == {"mot": ("mot", "dense"), "moe": ("moe", "dense"), "sparse": ("mot", "moe")}
    assert config.verdicts == ("sparse",)
    assert validate(ForeignConfig, SOUND, source="question.toml").verdicts == ("mot", "moe")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"baseline": "dence"}, 'baseline = "dence" is no arm; arms: dense, mot, moe'),
        ({"arms": ["dense"]}, "arms"),
        ({"arms": ["dense", "mot", "mot"]}, "names an arm twice"),
        ({"arms": ["dense", "a/b"]}, 'arm "a/b": it names folders'),
        ({"primary": ["other"]}, 'primary: "other" is no contrast'),
        ({"samedata": True}, 'samedata: unknown key; did you mean "same_data"'),
    ],
)
def test_what_is_wrong_is_said(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(ForeignConfig, SOUND | values, source="question.toml")
