"""Fetching what the coming steps read of sources behind URLs, in the order in which they read it.

The plan of a step is computed from lengths alone, so the pieces of shards that it reads are known long
before. A thread plans ahead and says of every piece that it is needed: the cache keeps what was needed last,
and so drops what lies behind. Other threads fetch the pieces that are missing. An error is left to the thread
that reads: it asks for the piece again and raises what that raises.
"""

import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import count

import numpy as np

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.remote.folder import RemoteShards
from data_pipeline.shards.index import TokenSource
from data_pipeline.stream.order import CHUNK_DOCUMENTS, WINDOW_CHUNKS
from data_pipeline.stream.stream import BlockPlan, Stream, StreamState

_FETCHERS = 8
_AHEAD_STEPS = 64
"""Steps that are planned ahead at most."""
_CACHE_FRAC = 0.5
"""Share of the cache that holds what lies ahead; the rest is for other ranks and for what is being read."""

Piece = tuple[int, int, int]
"""(number of the source, shard, piece of the shard)."""


class FetchAhead:
    """Threads that fetch for one rank, from `state` on, until close(). They end with the process."""

    def __init__(self, stream: Stream, positions: np.ndarray, state: StreamState) -> None:
        """`positions`: those of the rank's sequences in a step."""
        self._remote = {i: source.remote for i, source in enumerate(stream.sources) if source.remote}
        self._stream, self._positions, self._state = stream, positions, state
        self._missing: deque[Piece] = deque()
        self._asked_for: set[Piece] = set()
        """The missing pieces, and those that are being fetched."""
        self._changed = threading.Condition()
        self._steps_read = 0
        self._planned: deque[tuple[int, tuple[Piece, ...]]] = deque()
        """(number, pieces) of steps that are planned and not yet read."""
        self._times_ahead: Counter[Piece] = Counter()
        """Piece -> number of these steps that read it."""
        self._closed = False
        work = {"plan fetches": self._plan, **{f"fetch data {i}": self._fetch for i in range(_FETCHERS)}}
        for remote in self._remote.values():
            remote.folder.has_given_up.clear()
        for name, target in work.items() if self._remote else ():
            threading.Thread(target=target, name=name, daemon=True).start()

    def step_is_read(self) -> None:
        """One more step was read, so more may be planned."""
        with self._changed:
            self._steps_read += 1
            while self._planned and self._planned[0][0] < self._steps_read:
                for piece in self._planned.popleft()[1]:
                    self._times_ahead[piece] -= 1
                    if not self._times_ahead[piece]:
                        del self._times_ahead[piece]
            self._changed.notify_all()

    def close(self) -> None:
        """Let the threads end, each after what it is at, and fetches that fail now. Safe to call twice."""
        for remote in self._remote.values():
            remote.folder.has_given_up.set()
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _plan(self) -> None:
        state = self._state
        for step in count():
            plan, state = self._stream.plan_step(state)
            pieces = tuple(self._pieces(plan.take(self._positions)))
            with self._changed:
                self._changed.wait_for(partial(self._may_plan, step, pieces))
                if self._closed:
                    return
                if step < self._steps_read:
                    continue
                self._planned.append((step, pieces))
                self._times_ahead.update(pieces)
            for piece in pieces:
                self._ask_for(piece)

    def _may_plan(self, step: int, pieces: Sequence[Piece]) -> bool:
        """Whether a step with these pieces is not too far ahead. The next one never is."""
        if self._closed or step <= self._steps_read:
            return True
        num_ahead = len(self._times_ahead) + sum(piece not in self._times_ahead for piece in pieces)
        of_cache = max(r.piece_bytes / r.folder.cache.max_bytes for r in self._remote.values())
        return len(self._planned) < _AHEAD_STEPS and num_ahead * of_cache <= _CACHE_FRAC

    def _pieces(self, plan: BlockPlan) -> Iterator[Piece]:
        """The pieces that a plan reads, each once, in its order."""
        seen: set[Piece] = set()
        for number, document in zip(plan.source.tolist(), plan.document.tolist(), strict=True):
            if (remote := self._remote.get(number)) is not None:
                for piece in pieces_of(self._stream.sources[number], remote, document):
                    if (found := (number, *piece)) not in seen:
                        seen.add(found)
                        yield found

    def _ask_for(self, piece: Piece) -> None:
        """Let a piece that is not in the cache be fetched; one that is there counts as needed now."""
        number, shard, part = piece
        if self._remote[number].is_there(shard, part):
            return
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._missing) < 2 * _FETCHERS)
            if piece not in self._asked_for:
                self._missing.append(piece)
                self._asked_for.add(piece)
                self._changed.notify_all()

    def _fetch(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._missing)
                if self._closed:
                    return
                number, shard, part = piece = self._missing.popleft()
                self._changed.notify_all()
            try:
                self._remote[number].ensure(shard, part)
            except (ConfigError, OSError):
                pass  # the thread that reads meets it too
            finally:
                with self._changed:
                    self._asked_for.discard(piece)


def pieces_of(source: TokenSource, remote: RemoteShards, document: int) -> list[tuple[int, int]]:
    """(shard, piece) of all pieces that hold a document."""
    shard, start, stop = source.byte_range(document)
    pieces = range(start // remote.piece_bytes, -(-stop // remote.piece_bytes))
    return [(shard, piece) for piece in pieces]


def cache_warnings(stream: Stream) -> list[str]:
    """One line for each cache that is too small for its sources, so that pieces would be fetched again and
    again: for the log at start-up."""
    needed: dict[tuple[str, int], int] = {}
    for source in stream.sources:
        if source.remote is not None:
            cache = source.remote.folder.cache
            place = (str(cache.folder), cache.max_bytes)
            needed[place] = needed.get(place, 0) + bytes_in_use(source, source.remote)
    return [
        f"warning: {folder}: data.cache_gb = {most / 1e9:g}, but the documents among which two neighbouring "
        f"blocks choose take up to {size / 1e9:.3g} GB: pieces will be fetched again and again; raise "
        f"data.cache_gb to {size / 1e9 / _CACHE_FRAC:.2g}"
        for (folder, most), size in needed.items()
        if size > _CACHE_FRAC * most
    ]


def bytes_in_use(source: TokenSource, remote: RemoteShards) -> int:
    """Bytes of a source that its coming blocks choose from, at most: two windows of its order, in pieces."""
    total = sum(entry["bytes"] for entry in source.manifest["shards"])
    window = CHUNK_DOCUMENTS * WINDOW_CHUNKS
    if source.num_documents <= window or remote.folder.comes_whole:
        return total
    of_chunk = CHUNK_DOCUMENTS * total // source.num_documents + remote.piece_bytes
    return min(total, 2 * WINDOW_CHUNKS * of_chunk)
