"""Errors of the operating system, told in one line that names the file."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

_MISPLACED = {
    errno.EACCES, errno.EEXIST, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EPERM,
}  # fmt: skip
_ADVICE = {
    errno.ENOSPC: "make room, then the same command goes on",
    errno.EDQUOT: "make room in the quota, then the same command goes on",
    errno.EROFS: "the file system is read-only; mount it for writing, or choose another folder",
    errno.EIO: "the disk or its server fails; look at the system's log, then the same command goes on",
    errno.EACCES: "give this user the right to it, or choose another path",
    errno.EPERM: "give this user the right to it, or choose another path",
    errno.EISDIR: "a folder stands where a file belongs; move it away",
    errno.ENOTDIR: "a file stands where a folder belongs; move it away",
    errno.EEXIST: "something else stands there; move it away",
}


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give the name of `path` to an OSError of the block that names no file, as those of write and fsync."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(path)
        raise


def os_error_text(error: OSError) -> str | None:
    """The message for a person: file, what failed, what to do. None for an error that names no file."""
    if error.filename is None or error.errno is None:
        return None
    name = " -> ".join(os.fsdecode(file) for file in (error.filename, error.filename2) if file is not None)
    advice = _ADVICE.get(error.errno)
    return f"{name}: {error.strerror}" + (f"; {advice}" if advice else "")


def is_misplaced(error: OSError) -> bool:
    """Whether a person must mend the path: it is of the wrong kind or owner, and trying again cannot help."""
    return error.errno in _MISPLACED
