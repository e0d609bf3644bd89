import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from data_pipeline.tokenize.config import TokenizeConfig


def problem(values: dict) -> str:
    with pytest.raises(ConfigError) as error:
        validate(TokenizeConfig, values, "data.toml")
    return str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "[text] is needed"),
        ({"text": {"vocab_sise": 900}}, 'text.vocab_sise: unknown key; did you mean "vocab_size"?'),
        ({"text": {}, "immage": {}}, 'immage: unknown key; did you mean "image"?'),
        ({"text": {"vocab_size": 100}}, "text.vocab_size = 100"),
        ({"text": {}, "image": {"size_px": 30}}, "size_px = 30 is not a multiple of patch_px = 4"),
        ({"text": {}, "image": {"num_codes": 8}}, "num_verbatim = 32 is more than num_codes = 8"),
        ({"text": {}, "speech": {"units_per_s": 7}}, "must divide 16000"),
        ({"text": {}, "max_bad_frac": 2}, "max_bad_frac = 2"),
        ({"text": {}, "tokenizers_from": "x"}, "brings its own settings; remove the tables ['text']"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    assert message in problem(values)


def test_tables_say_which_modalities_there_are() -> None:
    config = validate(TokenizeConfig, {"text": {}, "speech": {}}, "data.toml")
    assert config.image is None and config.speech is not None
