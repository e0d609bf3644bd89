"""An error of the system becomes one line with the file's name."""

import errno
import os
from pathlib import Path

import pytest

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.os_errors import is_misplaced, naming, os_error_text


def test_an_error_without_a_name_gets_one_and_another_keeps_its_own() -> None:
    for named, expected in ((None, "a/b"), ("c", "c")):
        with pytest.raises(OSError) as caught, naming(Path("a/b")):
            raise OSError(errno.ENOSPC, "No space left on device", *([named] if named else []))
        assert os_error_text(caught.value) == (
            f"{expected}: No space left on device; make room, then the same command goes on"
        )


def test_an_error_that_names_no_file_has_no_text() -> None:
    assert os_error_text(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    with pytest.raises(TimeoutError) as caught, naming("a"):  # it has no number: it is not the system's
        raise TimeoutError("too late")
    assert os_error_text(caught.value) is None


def test_a_rename_names_both_paths() -> None:
    with pytest.raises(OSError) as caught:
        os.rename("/proc/self/nothing", "/proc/self/there")
    assert os_error_text(caught.value) == "/proc/self/nothing -> /proc/self/there: No such file or directory"


def test_what_a_person_must_mend_is_told_from_what_may_pass() -> None:
    assert is_misplaced(OSError(errno.EISDIR, "Is a directory", "a"))
    assert not is_misplaced(OSError(errno.EIO, "Input/output error", "a"))


def test_an_atomic_file_is_named_and_not_its_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "a.json").mkdir()
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "a.json") as file:
        file.write(b"x")
    assert (caught.value.filename, caught.value.filename2) == (str(tmp_path / "a.json"), None)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    with pytest.raises(OSError) as caught, atomic_file(tmp_path / "none" / "b.json"):
        pass
    assert caught.value.filename == str(tmp_path / "none" / "b.json")
