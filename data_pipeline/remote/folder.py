"""A folder of token shards behind a URL: its small files whole, its shards in pieces, all through a cache.

A shard is fetched in pieces of 256 KiB, not whole: documents of a block come from about a thousand runs of
128 neighbours, anywhere in a large source (order.py), so whole shards would be fetched many times over, or
fill the disk. A source that gives no ranges, as a command, gives a shard whole, and all its pieces are kept.
"""

import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from data_pipeline.files.printable import printable
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.location import PIPE, RemoteSettings, file_url, scheme_of, shown_file
from data_pipeline.remote.node_cache import Key, NodeCache, default_folder
from data_pipeline.remote.opener import Body, FetchFailed, open_range
from data_pipeline.shards.tar import MANIFEST, ShardError, Url

_LONGEST_WAIT_S = 15.0
_TELL_EVERY_S = 10.0
_LASTING_S = 5.0
"""Seconds for which an answer such as 404 is asked again: some servers mean "not now" by it."""
_PART_BYTES = 1 << 24
"""Bytes by which files other than shards are fetched."""
_T = TypeVar("_T")


class SourceGone(ShardError):
    """A file behind a URL could not be fetched, for longer than data.retry_s."""


class RemoteFolder:
    """Fetches files of a folder behind a URL, again and again while they fail."""

    def __init__(self, url: Url, settings: RemoteSettings) -> None:
        self.url, self.settings = url, settings
        self.cache = NodeCache(settings.cache_dir or default_folder(), settings.cache_bytes)
        self.fetching: dict[int, str] = {}
        """Thread -> what it fetches or waits for, for people."""
        self.comes_whole = scheme_of(url) == PIPE
        """Whether the source gave a whole shard where a range was asked for last."""
        self.has_given_up = threading.Event()
        """Set: what fails is not tried again, until a file is fetched."""
        self._random = random.Random()  # its own: training draws from the global one

    @property
    def local(self) -> Path:
        """The folder of this machine where files are once they are fetched."""
        return self.cache.path(self.key(""))

    @property
    def may_fetch(self) -> bool:
        """Whether files may be fetched: always, but for a command that is not to be run."""
        return scheme_of(self.url) != PIPE or self.settings.runs_commands

    def fetch(self, name: str) -> None:
        """Fetch a file other than a shard into `local`, whatever is there. Raises SourceGone."""
        with self.telling(name), self.cache.new_file(self.key(name), 0) as file:
            done, told = False, time.monotonic()
            while not done:
                done = self.persist(name, lambda: self._fetch_part(name, file))
                if not done and time.monotonic() > told + _TELL_EVERY_S:
                    told = time.monotonic()
                    print(f"fetching {shown_file(self.url, name)}: {file.tell() >> 20} MiB", flush=True)

    def key(self, name: str) -> Key:
        """The key of a file in the cache."""
        return Key(self.url.text, name)

    def _fetch_part(self, name: str, file: IO[bytes]) -> bool:
        """Write the next part of a file behind what is there; whether it was the last."""
        start = file.tell()
        with self.opened(name, start, start + _PART_BYTES) as body:
            self.comes_whole = body.is_whole
            if body.is_whole:
                file.seek(0)
                file.truncate()
            for chunk in body.chunks:
                self.cache.make_room(len(chunk))
                file.write(chunk)
        if body.total is None:
            return True
        if file.tell() != (body.total if body.is_whole else min(start + _PART_BYTES, body.total)):
            raise FetchFailed(f"ended after {file.tell()} of {body.total} bytes")
        return file.tell() == body.total

    def opened(self, name: str, start: int, stop: int) -> Any:
        """open_range of a file of the folder. Raises ConfigError for a command that is not to be run, and
        ShardError for a name that no command is given."""
        if not self.may_fetch:
            raise ConfigError(
                f"{self.url}: `motley train`, `submit` and `compare` alone run a command, because a run's "
                "directory may be somebody else's; where they have run, its index is in the cache of the "
                "machine. Copy the shards to a folder, or type a URL, to look at documents"
            )
        try:
            url = file_url(self.url, name)
        except ValueError as error:
            raise ShardError(str(error)) from None
        return open_range(url, start, stop, self.settings.stall_s)

    @contextmanager
    def telling(self, name: str) -> Iterator[None]:
        """Say in `fetching` that this thread fetches a file or waits for it."""
        thread = threading.get_ident()
        self.fetching[thread] = shown_file(self.url, name)
        try:
            yield
        finally:
            self.fetching.pop(thread, None)

    def persist(self, name: str, attempt: Callable[[], _T]) -> _T:
        """The result of an attempt that does not fail, of those made in retry_s seconds with growing waits.

        Raises SourceGone. Behind it, other files are tried once, until one is fetched.
        """
        began, wait_s = time.monotonic(), self.settings.first_wait_s
        tries, refused_since, url = 1, None, shown_file(self.url, name)
        while True:
            try:
                result = attempt()
                self.has_given_up.clear()
                return result
            except FetchFailed as error:
                why, now, retry_s = printable(str(error)), time.monotonic(), self.settings.retry_s
                refused_since = (refused_since or now) if error.is_lasting else None
                is_refused = refused_since is not None and now + wait_s > refused_since + _LASTING_S
                if self.has_given_up.is_set() or is_refused or now + wait_s > began + retry_s:
                    self.has_given_up.set()
                    raise SourceGone(_gone(url, why, tries, now - began, error.is_lasting)) from None
            tries += 1
            self.fetching[threading.get_ident()] = f"{url} ({why}; attempt {tries})"
            self.has_given_up.wait(wait_s * self._random.uniform(0.5, 1.0))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _gone(url: str, why: str, tries: int, waited_s: float, is_lasting: bool) -> str:
    """The message for a file that could not be fetched."""
    remedy = (
        "see that the file is there, and that this machine may read it"
        if is_lasting
        else "see that its server answers, or raise data.retry_s"
    )
    how_often = f"{tries} attempts in {waited_s:.0f} s" if tries > 1 else "1 attempt"
    return f"{url}: {why} ({how_often}); {remedy}. Then the same command goes on from the last checkpoint"


class RemoteShards:
    """Reads bytes of the shards of a folder, by their numbers in its manifest."""

    def __init__(self, folder: RemoteFolder, entries: Sequence[Mapping[str, Any]]) -> None:
        self.folder, self._entries = folder, entries
        self.piece_bytes = folder.settings.piece_bytes

    def num_bytes(self, shard: int) -> int:
        return self._entries[shard]["bytes"]

    def read(self, shard: int, start: int, size: int) -> bytes:
        """`size` bytes of a shard, of which there are fewer at its end. Raises SourceGone."""
        stop, step = min(start + size, self.num_bytes(shard)), self.piece_bytes
        pieces = range(start // step, -(-stop // step)) if 0 <= start < stop else range(0)
        return b"".join(
            self._read_piece(shard, piece, max(start - piece * step, 0), min(stop - piece * step, step))
            for piece in pieces
        )

    def ensure(self, shard: int, piece: int) -> None:
        """Fetch a piece of a shard, unless it is there. Raises SourceGone."""
        if not self.is_there(shard, piece):
            self._read_piece(shard, piece, 0, 1)

    def is_there(self, shard: int, piece: int) -> bool:
        """Whether a piece is in the cache; it then counts as needed now."""
        return self.folder.cache.is_there(self._key(shard, piece))

    def forget(self, shard: int, start: int, stop: int) -> None:
        """Take the pieces that hold bytes start ... stop - 1 out of the cache."""
        for piece in range(start // self.piece_bytes, -(-stop // self.piece_bytes)):
            self.folder.cache.forget(self._key(shard, piece))

    def _key(self, shard: int, piece: int) -> Key:
        """The content of a piece, whatever its URL: two sources that hold a shard share its pieces."""
        entry = self._entries[shard]
        return Key(f"{entry['sha256']}\n{entry['bytes']}\n{self.piece_bytes}\n{piece}")

    def _size(self, shard: int, piece: int) -> int:
        return min(self.piece_bytes, self.num_bytes(shard) - piece * self.piece_bytes)

    def _read_piece(self, shard: int, piece: int, start: int, stop: int) -> bytes:
        """Bytes start ... stop - 1 of a piece, which is fetched if it is not in the cache."""
        cache, name, key = self.folder.cache, self._entries[shard]["name"], self._key(shard, piece)
        size = self._size(shard, piece)
        while (data := cache.read(key, start, stop, size)) is None:
            with (
                self.folder.telling(name),
                cache.held(self._key(shard, 0) if self.folder.comes_whole else key),
            ):
                if not cache.is_there(key):  # whoever held it may have fetched it
                    fetched = self.folder.persist(name, lambda: self._fetch_piece(shard, piece))
                    return fetched[start:stop]
        return data

    def _fetch_piece(self, shard: int, piece: int) -> bytes:
        """A piece as it comes from the source, which the cache then has. Raises FetchFailed."""
        first, size = piece * self.piece_bytes, self._size(shard, piece)
        with self.folder.opened(self._entries[shard]["name"], first, first + size) as body:
            if body.total is not None and body.total != self.num_bytes(shard):
                why = f"it holds {body.total} bytes where {MANIFEST} says {self.num_bytes(shard)}"
                raise FetchFailed(why, is_lasting=True)
            self.folder.comes_whole = body.is_whole
            if body.is_whole:
                return self._keep_all(shard, piece, body)
            data = b"".join(body.chunks)
        if len(data) != size:
            raise FetchFailed(f"ended after {len(data)} of {size} bytes")
        self._keep(shard, piece, data)
        return data

    def _keep_all(self, shard: int, wanted: int, body: Body) -> bytes:
        """Keep every piece of a shard that comes whole; the piece that is wanted. Raises FetchFailed."""
        rest, piece, found, come = bytearray(), 0, b"", 0
        for chunk in body.chunks:
            come += len(chunk)
            rest += chunk
            while rest and come <= self.num_bytes(shard) and len(rest) >= (size := self._size(shard, piece)):
                data = bytes(rest[:size])
                del rest[:size]
                if piece == wanted:
                    found = data
                if piece == wanted or not self.is_there(shard, piece):
                    self._keep(shard, piece, data)
                piece += 1
        if come != self.num_bytes(shard):
            lasting = come > self.num_bytes(shard)
            raise FetchFailed(f"{come} bytes came, of {self.num_bytes(shard)}", is_lasting=lasting)
        return found

    def _keep(self, shard: int, piece: int, data: bytes) -> None:
        with self.folder.cache.new_file(self._key(shard, piece), len(data)) as file:
            file.write(data)
