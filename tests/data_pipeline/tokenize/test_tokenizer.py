from pathlib import Path

import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.tokenizer import SETTINGS, fingerprint_of, load_settings


def test_a_fingerprint_depends_on_settings_and_on_each_content() -> None:
    prints = [
        fingerprint_of({"a": 1, "b": 2}, b"x", b"y"),
        fingerprint_of({"a": 1, "b": 3}, b"x", b"y"),
        fingerprint_of({"a": 1, "b": 2}, b"xy"),
        fingerprint_of({"a": 1, "b": 2}, b"y", b"x"),
    ]
    assert len(set(prints)) == 4
    assert fingerprint_of({"b": 2, "a": 1}, b"x", b"y") == prints[0]
    assert all(len(found) == 16 for found in prints)


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_that_is_no_saved_tokenizer_is_said(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / SETTINGS).write_text(content)
    with pytest.raises(ConfigError, match="not a saved tokenizer"):
        load_settings(tmp_path)
