"""A JSON object that is not what a reader needs is named with its file and field."""

from pathlib import Path

import pytest

from data_pipeline.files.json_file import Fields, read_object
from data_pipeline.files.toml_config import ConfigError

FIELDS: Fields = {"attempts": list, "step": (int, type(None))}


def test_an_object_with_its_fields_is_read(tmp_path: Path) -> None:
    for text in ('{"attempts": [], "step": null, "more": 1}', '{"attempts": [1], "step": 3}'):
        (tmp_path / "a.json").write_text(text)
        assert read_object(tmp_path / "a.json", FIELDS)["attempts"] in ([], [1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[]", "a.json: holds a list, not an object; was it edited?"),
        (b"3", "a.json: holds a whole number, not an object"),
        (b"{", r"a.json: not valid JSON \(Expecting"),
        (b"", "a.json: not valid JSON"),
        (b"\xff\xfe", "a.json: not valid JSON"),
        (b"[" * 100_000, "a.json: not valid JSON"),
        (b'{"step": 1}', "a.json: attempts: required, but missing"),
        (b'{"attempts": {}, "step": 1}', "a.json: attempts: an object, should be a list"),
        (b'{"attempts": [], "step": "1"}', "a.json: step: a text, should be a whole number or null"),
        (b'{"attempts": [], "step": true}', "a.json: step: true or false, should be a whole number"),
    ],
)
def test_another_is_refused_by_file_and_field(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_object(tmp_path / "a.json", FIELDS)
