from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError, validate
from pretrain.config import RunConfig
from pretrain.run_tokenizers import tokenizers_of_run
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.tiny_tokenizers import write_tokenized_data


def test_tokenizers_are_found_beside_the_data_or_where_they_were_moved(tmp_path: Path) -> None:
    """What is said of changed ones: generation/test_trained_model.py."""
    sizes = write_tokenized_data(tmp_path / "data").sizes
    config = validate(RunConfig, tiny_run(tmp_path / "data", tmp_path / "runs"), source="test")
    assert list(tokenizers_of_run(tmp_path, config, None)) == list(sizes)
    (tmp_path / "data" / "tokenizers").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match="with --tokenizers DIR"):
        tokenizers_of_run(tmp_path, config, None)
    assert list(tokenizers_of_run(tmp_path, config, tmp_path / "away")) == list(sizes)
