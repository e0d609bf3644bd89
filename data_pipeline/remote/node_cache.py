"""A folder of bounded size that the processes of a machine share: files that can be fetched again.

    folder/files/ab/abcdef...           a file, whole; some have a folder of this name and a name of their own
    folder/files/.../NAME.SIZE.x.tmp    a file that is written, for which SIZE bytes are reserved
    folder/locks/                       held by who fetches a file, and by who makes room
    folder/used                         bytes of all files and reservations

Room is reserved before a byte is written, so the folder never holds more than its bound. Files that were not
needed for the longest time go first. A process may be killed at any moment: locks end with it, names are
given to whole files only, and its reservation counts until the next look at the folder.
"""

import contextlib
import hashlib
import os
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, NamedTuple

from data_pipeline.files.lock import LockHeld, lock_directory
from data_pipeline.files.os_errors import naming
from data_pipeline.files.toml_config import ConfigError

_FILES, _LOCKS, _ROOM, _USED = "files", "locks", "room", "used"
_SLOTS = 1024
"""Locks for files: two files that share one are fetched one after the other, which harms nothing."""
_POLL_S, _ROOM_POLL_S = 0.01, 0.001
"""Seconds between two looks at a lock: a fetch is long, making room is not."""
_KEPT_FRAC = 0.9
"""Share of the bound that is left when files had to go, so that the folder is seldom looked through."""
_KNOWN_PLACES = 1 << 16
"""Files whose place is not computed again, which takes as long as reading a document."""
_DEAD_AFTER_S = 3600.0
"""A temporary file of this age has no writer."""


class Key(NamedTuple):
    """What a file holds. Its place is the hash of `text`."""

    text: str
    name: str = ""
    """Files that have a name share the folder of their `text`."""


def default_folder() -> Path:
    """The cache of this user where this machine keeps temporary files.

    Raises ConfigError where somebody else has made it: such a person could put files there.
    """
    folder = Path(tempfile.gettempdir()) / f"motley-cache-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ConfigError(f"{folder}: belongs to somebody else; set data.cache_dir to a folder of your own")
    return folder


class NodeCache:
    """Files by key, in a folder of at most `max_bytes` bytes."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._place = lru_cache(_KNOWN_PLACES)(self._find_place)
        folder.mkdir(parents=True, exist_ok=True)

    def path(self, key: Key) -> Path:
        """Where the file of a key is, if it is there."""
        return Path(self._place(key))

    def _find_place(self, key: Key) -> str:
        hashed = hashlib.sha256(key.text.encode()).hexdigest()[:40]
        return str(self.folder / _FILES / hashed[:2] / hashed / key.name)

    def is_there(self, key: Key) -> bool:
        """Whether the file is there; it then counts as needed now."""
        try:
            os.utime(self._place(key))
        except FileNotFoundError:
            return False
        return True

    def read(self, key: Key, start: int, stop: int, num_bytes: int) -> bytes | None:
        """Bytes start ... stop - 1 of a file of `num_bytes`; None if it is not there. A file of another size,
        or one that cannot be read, is removed."""
        try:
            descriptor = os.open(self._place(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            if os.fstat(descriptor).st_size == num_bytes:
                return os.pread(descriptor, stop - start, start)
        except OSError:
            pass
        finally:
            os.close(descriptor)
        self.forget(key)
        return None

    def forget(self, key: Key) -> None:
        """Remove a file, if it is there."""
        self.path(key).unlink(missing_ok=True)

    @contextmanager
    def held(self, key: Key) -> Iterator[None]:
        """Wait for whoever fetches the file of `key`, and let others wait while the block runs."""
        slot = int(hashlib.sha256(repr(key).encode()).hexdigest(), 16) % _SLOTS
        with self._locked(f"{slot:04d}"):
            yield

    @contextmanager
    def new_file(self, key: Key, num_bytes: int) -> Iterator[IO[bytes]]:
        """A file to write `num_bytes` into, which is that of `key` behind the block: absent or whole."""
        path = self.path(key)
        temporary = path.with_name(f"{path.name}.{num_bytes}.{secrets.token_hex(4)}.tmp")
        try:
            with naming(temporary):
                self.make_room(num_bytes, temporary)
                with open(temporary, "wb") as file:
                    yield file
                os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def make_room(self, num_bytes: int, temporary: Path | None = None) -> None:
        """Reserve bytes, removing files where there is no room; `temporary`: an empty file that is made."""
        with self._locked(_ROOM, _ROOM_POLL_S):
            used = self._used()
            if used is None or used + num_bytes > self.max_bytes:
                used = self._evict(num_bytes)
            (self.folder / _USED).write_text(f"{used + num_bytes}\n")
            if temporary is not None:
                temporary.parent.mkdir(parents=True, exist_ok=True)
                temporary.touch()

    def _used(self) -> int | None:
        """Bytes that are used or reserved; None if nobody has counted them, or the count was cut short."""
        try:
            text = (self.folder / _USED).read_text()
            return int(text) if text.endswith("\n") else None
        except (FileNotFoundError, ValueError):
            return None

    def _evict(self, num_bytes: int) -> int:
        """Remove the files that were needed longest ago, to make room for `num_bytes`; bytes in use then.

        Raises ConfigError if there is no room even so.
        """
        files, used = [], 0
        for path in (self.folder / _FILES).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # another process may remove one
                about = path.stat()
                if stat.S_ISDIR(about.st_mode):
                    continue
                if path.suffix != ".tmp":
                    files.append((about.st_mtime, about.st_size, path))
                elif time.time() - about.st_mtime > _DEAD_AFTER_S:
                    path.unlink()
                    continue
                used += about.st_size if path.suffix != ".tmp" else max(about.st_size, _reserved(path))
        if used + num_bytes > self.max_bytes:
            for _, size, path in sorted(files):
                if used + num_bytes <= _KEPT_FRAC * self.max_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= size
        if used + num_bytes > self.max_bytes:
            raise ConfigError(
                f"{self.folder}: no room for {num_bytes:,} bytes within data.cache_gb = "
                f"{self.max_bytes / 1e9:g}, of which {used:,} bytes are being written; raise data.cache_gb"
            )
        return used

    @contextmanager
    def _locked(self, name: str, poll_s: float = _POLL_S) -> Iterator[None]:
        """Wait until this thread holds a lock of the folder."""
        while True:
            with ExitStack() as stack:
                try:
                    stack.enter_context(lock_directory(self.folder / _LOCKS, str, name=name))
                except LockHeld:
                    pass
                else:
                    yield
                    return
            time.sleep(poll_s)


def _reserved(temporary: Path) -> int:
    """Bytes that a temporary file was made for, by its name; 0 for a foreign name."""
    size = temporary.name.split(".")[-3:-2]
    return int(size[0]) if size and size[0].isdecimal() else 0
