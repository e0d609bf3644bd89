"""The lock of a directory: one process at a time writes there."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from data_pipeline.files.os_errors import naming
from data_pipeline.files.toml_config import ConfigError

LOCK = "lock"
_HELD: dict[Path, str] = {}
"""The lock files that this process holds, with the text in them. A process that closes any handle of a file
loses its POSIX locks on that file, so no second handle of these may be opened."""


class LockHeld(ConfigError):
    """Another process, or another thread of this one, holds the lock."""


@contextmanager
def lock_directory(
    directory: Path, refusal: Callable[[str], str], *, name: str = LOCK, shared: bool = False
) -> Iterator[None]:
    """Hold the lock file `name` in `directory`, which is made if it is missing, while the block runs.

    Two `shared` holders do not exclude each other. Raises LockHeld(refusal("pid 7 on node1 since ...")) if
    the lock is held, and OSError, naming the file, if it cannot be written. A file system without locks gets
    one line on stderr, and nothing is excluded.

    The lock is a POSIX record lock, which NFS knows too. The kernel drops it when its process ends, so it is
    never stale; an flock would pass to forked workers and outlive its process.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = (directory / name).resolve()
    now = datetime.now(UTC).isoformat(timespec="seconds")
    holder = f"pid {os.getpid()} on {socket.gethostname()} since {now}"
    if (other := _HELD.setdefault(path, holder)) is not holder:  # one step: threads may come at once
        raise LockHeld(refusal(other))
    with ExitStack() as stack:
        stack.callback(_HELD.pop, path)
        file = stack.enter_context(path.open("a+", errors="replace"))
        try:
            fcntl.lockf(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise LockHeld(refusal(file.read().strip() or "another process")) from None
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            print(f"{path}: no locks on this file system; two writers would go unnoticed", file=sys.stderr)
        try:
            with naming(path):
                file.truncate(0)  # what a killed process left there
                if not shared:
                    file.write(f"{holder}\n")
                    file.flush()
            yield
        finally:
            with naming(path):
                file.truncate(0)
