from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.config import RunConfig
from pretrain.training_stream import training_stream
from tests.pretrain.tiny_data import tiny_run, write_tiny_data


def test_the_stream_is_that_of_the_config(tmp_path: Path) -> None:
    values = tiny_run(tmp_path, tmp_path / "runs")
    config = validate(RunConfig, values, source="test")
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        training_stream(config)
    write_tiny_data(tmp_path)
    stream = training_stream(config)
    assert (stream.seed, stream.context_tokens, stream.sequences_per_step) == (3, 64, 4)
    assert stream.num_documents == 200
