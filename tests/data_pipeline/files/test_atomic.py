"""A file is absent, as it was, or whole."""

import json
import os
import stat
import tempfile
from pathlib import Path

import pytest

from data_pipeline.files.atomic import atomic_file, usual_mode, write_json


def test_a_writer_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    for before in (None, {"a": 1}):
        if before is not None:
            write_json(tmp_path / "a.json", before)
        with pytest.raises(RuntimeError), atomic_file(tmp_path / "a.json") as file:
            file.write(b"half")
            raise RuntimeError
        assert [path.name for path in tmp_path.iterdir()] == ([] if before is None else ["a.json"])
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_no_file_gets_a_name_with_control_characters(tmp_path: Path) -> None:
    for name in ("a\nb", "a\x1b[2Jb", "a\u202eb"):
        with pytest.raises(OSError, match="takes no control characters"), atomic_file(tmp_path / name):
            pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_a_file_that_was_made_elsewhere_gets_the_mode_of_a_new_one(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with usual_mode(tmp_path / "a"):
            descriptor, name = tempfile.mkstemp(dir=tmp_path)  # as safetensors does
            os.close(descriptor)
            os.rename(name, tmp_path / "a")
        assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask
    finally:
        os.umask(before)
