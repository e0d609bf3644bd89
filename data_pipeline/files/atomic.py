"""Files that are whole or absent, whenever the process dies."""

import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_pipeline.files.printable import hidden_characters, printable


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write to `path`.tmp, then rename it: `path` is absent or whole, whenever the process dies.

    Raises OSError for a name with control characters, which no terminal shows as it is. An OSError of the
    file names `path`.
    """
    if hidden_characters(path.name):
        raise OSError(errno.EINVAL, "a file's name takes no control characters", printable(str(path)))
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):  # of the same disk; the first error tells more
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(temporary), temporary):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` behind the block: `path` is absent or whole."""
    writing = path.with_name(f"writing.{path.name}")
    try:
        shutil.rmtree(writing, ignore_errors=True)  # a killed writer may have left it
        writing.mkdir(parents=True)
        yield writing
        os.rename(writing, path)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


@contextmanager
def usual_mode(path: Path) -> Iterator[None]:
    """Give the file that the block writes at `path` the mode that any new file gets there.

    A writer that goes through a temporary file, as safetensors does, would leave it readable by its owner
    alone. The mode is that of an empty file, because a process cannot ask for its umask without changing it.
    """
    path.open("wb").close()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically; equal values give equal bytes."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())
