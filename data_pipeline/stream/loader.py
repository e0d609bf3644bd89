"""Reading what the stream planned: one thread plans, reads and packs the next steps while the loop trains.

A plan says all that is in a step, so how far the thread is ahead is not visible in the data, and the state
moves when a step is taken, not when it is read.
"""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import get_worker_info

from data_pipeline.files.printable import first_names
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import WrongChecksum
from data_pipeline.shards.index import Document, TokenSource
from data_pipeline.shards.loss_mask import is_target
from data_pipeline.shards.vectors import of_sequences, within
from data_pipeline.stream.batch import Batch, make_batch
from data_pipeline.stream.fetch_ahead import FetchAhead
from data_pipeline.stream.fingerprint import UNREADABLE, sequence_weights, step_digest
from data_pipeline.stream.stream import BlockPlan, Stream, StreamState

_TELL_EVERY_S = 10.0
"""Seconds of a wait for data after which a rank says what it waits for."""


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one optimizer step."""

    micro_batches: tuple[Batch, ...]
    inputs: tuple[Any, ...]
    """What `prepare` made of each micro-batch."""
    state_after: StreamState
    """The same on all ranks. A checkpoint saves it once the step is done."""
    wait_s: float
    """Seconds that next_step took: what the loop waited for data."""
    fill_frac: float
    """Slots of the global batch that are not padding, as planned."""
    epochs: tuple[float, ...]
    """Passes over each source, after this step."""
    digest: int
    """This rank's part of the digest of the bytes that were read (fingerprint.py), modulo 2^64."""
    unreadable: tuple[str, ...]
    """ "folder/shard/key" of documents whose bytes, as this rank read them, are not those indexed (crc32):
    padding without loss stands in their place."""
    sequences: tuple[range, ...] = ()
    """Of each micro-batch, the numbers of its sequences in the global batch: no layout changes them."""


class Loader:
    """`next_step()` gives the steps of a stream from `state` on, for one data-parallel rank, without end.

    A thread reads up to `prefetch_steps` steps ahead, which changes nothing in them; 0: next_step reads.
    Use as a context manager, or call close().
    """

    def __init__(
        self,
        stream: Stream,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_sequences: int,
        prefetch_steps: int = 2,
        prepare: Callable[[Batch], Any] = lambda batch: batch,
        state: StreamState | None = None,
    ) -> None:
        """`prepare`: makes a micro-batch's StepBatch.inputs, in the thread; it must be a pure function.

        Raises ConfigError for a step that ranks and micro-batches do not divide, or a foreign state.
        """
        _check_division(stream.sequences_per_step, dp_size, micro_batch_sequences)
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank = {dp_rank}: legal are 0 ... {dp_size - 1}")
        self._state = self._read_to = state or stream.start()
        stream.check(self._state)
        self._stream, self._prepare = stream, prepare
        self._sequences = range(dp_rank, stream.sequences_per_step, dp_size)
        self._positions = np.array(self._sequences)
        self._weights = sequence_weights(stream.sequences_per_step)[self._positions]
        self._micro_batch_sequences = micro_batch_sequences
        self._fetches = FetchAhead(stream, self._positions, self._state)
        self._thread = ThreadPoolExecutor(1, "read data") if prefetch_steps else None
        self._ahead: deque[Future[StepBatch]] = deque()
        for _ in range(prefetch_steps):
            self._read_one_more()

    def next_step(self) -> StepBatch:
        """The next step. Raises what reading it raised."""
        began = time.perf_counter()
        if self._thread is None:
            step = self._read_step()
        else:
            self._read_one_more()
            step = self._wait_for(self._ahead.popleft())
        self._state = step.state_after
        return replace(step, wait_s=time.perf_counter() - began)

    def _wait_for(self, step: Future[StepBatch]) -> StepBatch:
        """A step that is being read. A long wait says what is being fetched, in the log of the rank."""
        waited_s = 0.0
        while not wait([step], _TELL_EVERY_S).done:
            waited_s += _TELL_EVERY_S
            sources = [source.remote.folder for source in self._stream.sources if source.remote]
            if fetching := [text for folder in sources for text in list(folder.fetching.values())]:
                names = first_names(sorted(set(fetching)), 3)
                print(f"waiting for data for {waited_s:.0f} s: {names}", file=sys.stderr, flush=True)
        return step.result()

    def _read_one_more(self) -> None:
        assert self._thread is not None
        self._ahead.append(self._thread.submit(self._read_step))

    def _read_step(self) -> StepBatch:
        """Read the step after the last that was read. After an error the next call tries the same step."""
        plan, after = self._stream.plan_step(self._read_to)
        share = plan.take(self._positions)
        batch, contents, unreadable = read(self._stream, share)
        size = self._micro_batch_sequences
        starts = range(0, batch.num_sequences, size)
        micro_batches = tuple(batch.rows(i, i + size) for i in starts)
        step = StepBatch(
            micro_batches,
            inputs=tuple(self._prepare(micro_batch) for micro_batch in micro_batches),
            state_after=after,
            wait_s=0.0,
            fill_frac=plan.filled_slots / (self._stream.sequences_per_step * self._stream.context_tokens),
            epochs=self._stream.epochs(after),
            digest=step_digest(contents, share.weight, self._weights, np.diff(share.first)),
            unreadable=unreadable,
            sequences=tuple(self._sequences[i : i + size] for i in starts),
        )
        self._read_to = after
        self._fetches.step_is_read()
        return step

    @property
    def state(self) -> StreamState:
        """After the last step that next_step gave."""
        return self._state

    def close(self) -> None:
        """Stop the thread: at once, or after the step that it is reading. Safe to call twice."""
        self._fetches.close()
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _check_division(sequences_per_step: int, dp_size: int, micro_batch_sequences: int) -> None:
    """Raises ConfigError unless every rank gets a whole number of micro-batches of every step."""
    if dp_size < 1 or micro_batch_sequences < 1 or sequences_per_step % (dp_size * micro_batch_sequences):
        raise ConfigError(
            f"{sequences_per_step} sequences per step do not divide into {dp_size} data-parallel ranks x "
            f"micro-batches of {micro_batch_sequences}; change tokens_per_step, the number of ranks or the "
            f"micro-batch"
        )


def check_readable(unreadable: Sequence[str], num_documents: int, max_frac: float) -> None:
    """Raise WrongChecksum if the unreadable documents are more than `max_frac` of `num_documents`."""
    if len(unreadable) <= max_frac * num_documents:
        return
    more = f" (and {len(unreadable) - 3} more)" if len(unreadable) > 3 else ""
    raise WrongChecksum(
        f"{', '.join(unreadable[:3])}{more}: cannot be read as indexed (crc32): the shard was damaged or "
        f"replaced. Restore it, whose SHA-256 is in the folder's manifest.json, and give the same command, "
        f"which goes on from the last checkpoint. data.max_unreadable_frac = {max_frac:g} allows "
        f"{int(max_frac * num_documents)} of {num_documents} documents; under a higher one unreadable "
        f"documents become padding, and are counted in every row of metrics"
    )


class _Piece(NamedTuple):
    """A piece of a document as it was read."""

    name: str
    ids: np.ndarray
    counted: np.ndarray | None
    """bool, by slot: whether its target counts; None: all do."""
    vectors: dict[str, np.ndarray]
    """Those of its inputs."""


def _piece_of(
    source: TokenSource, document: int, name: str, content: Document, start: int, slots: int
) -> _Piece:
    """Slots start ... start + slots - 1 of a document."""
    masked = source.masked(document)
    return _Piece(
        name,
        content.ids[start : start + slots + 1],
        is_target(masked, start, slots) if len(masked) else None,
        within(content.vectors, content.ids, start, start + slots, source.vocabulary),
    )


def read(stream: Stream, plan: BlockPlan) -> tuple[Batch, np.ndarray, tuple[str, ...]]:
    """(sequences of a plan as one Batch, contents of all pieces as in fingerprint.py, unreadable documents).

    An unreadable document leaves padding of its length, without loss, at the end of its sequence; no other
    sequence is touched.
    """
    sequences: list[list[_Piece]] = []
    contents: list[int] = []
    unreadable: list[str] = []
    columns = (plan.source, plan.document, plan.start, plan.slots)
    pieces = list(zip(*(column.tolist() for column in columns), strict=True))
    for begin, end in pairwise(plan.first.tolist()):
        readable: list[_Piece] = []
        for number, document, start, slots in pieces[begin:end]:
            source = stream.sources[number]
            name, content, crc32 = source.fetch(document)
            if content is None:
                contents.append(UNREADABLE)
                unreadable.append(f"{source.folder}/{name}")
                continue
            contents.append(crc32)
            readable.append(_piece_of(source, document, name, content, start, slots))
        sequences.append(readable)
    has_masks = any(source.has_masks for source in stream.sources)
    batch = make_batch(
        [[piece.ids for piece in pieces] for pieces in sequences],
        sequence_tokens=stream.context_tokens,
        vocabulary=stream.vocabulary,
        samples=[[piece.name for piece in pieces] for pieces in sequences],
        targets=[[piece.counted for piece in pieces] for pieces in sequences] if has_masks else None,
        vectors=of_sequences(
            [[piece.vectors for piece in pieces] for pieces in sequences], stream.vocabulary
        ),
    )
    return batch, np.array(contents, np.uint64), tuple(unreadable)


def sequences(
    stream: Stream, *, dp_rank: int = 0, dp_size: int = 1, state: StreamState | None = None
) -> Callable[[], Iterator[dict[str, Any]]]:
    """First stage of a webdataset pipeline: `wds.DataPipeline(sequences(stream), wds.map(f), ...)`.

    Yields one packed sequence after another, each a sample with "__key__" (its number in the stream), the
    fields of Batch as arrays [S], and vectors of a modality as "vectors/image" [n, features]. Stages that map
    one sample to one keep order and place; `shuffle`, `select` and the like give both up. Reads in the
    process that iterates: in a DataLoader with several workers it raises ConfigError. Raises WrongChecksum
    for an unreadable document.
    """

    def stage() -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                "sequences(): more than one worker would repeat the data; use num_workers=0, or Loader"
            )
        with Loader(stream, dp_rank=dp_rank, dp_size=dp_size, micro_batch_sequences=1, state=state) as loader:
            while True:
                number = loader.state.sequences + dp_rank
                step = loader.next_step()
                check_readable(step.unreadable, stream.num_documents, max_frac=0.0)
                for i, batch in enumerate(step.micro_batches):
                    arrays = {name: value[0] for name, value in vars(batch).items() if name != "vectors"}
                    arrays |= {f"vectors/{name}": vectors.values for name, vectors in batch.vectors.items()}
                    yield {"__key__": f"{number + i * dp_size:012d}", **arrays}

    return stage
