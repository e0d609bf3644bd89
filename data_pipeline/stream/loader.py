"""Reading what the stream planned: workers turn plans into batches, and cannot change what is in them.

The main process plans (cheap, from the index) and hands each worker the whole of this rank's share of a
step; the worker reads it and sends one message back. A plan says all, so neither the number of workers nor
how far they read ahead is visible in the data, and the state moves when a step is taken, not when it is read.
"""

import sys
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.faults import WrongChecksum
from data_pipeline.stream.batch import Batch, make_batch
from data_pipeline.stream.reader_processes import explained_deaths, start_readers, stop_readers
from data_pipeline.stream.stream import BlockPlan, Stream, StreamState


@dataclass(frozen=True)
class StepBatch:
    """One rank's share of one optimizer step."""

    micro_batches: tuple[Batch, ...]
    state_after: StreamState
    """To be saved once the step is done; on all ranks the same."""
    wait_s: float
    """Time that next_step took: what the loop waited for data."""
    fill_frac: float
    """Slots of the global batch that are not padding, as planned."""
    epochs: tuple[float, ...]
    """Passes over each source, after this step."""
    bad_documents: tuple[str, ...]
    """ "shard/key" of what this rank could not read in this step (crc32); padding stands in its place."""


class Loader:
    """`next_step()` gives the steps of a stream from `state` on, for one data-parallel rank, without end.

    Use as a context manager, or call close(). Neither `num_workers` (0: read in this process) nor
    `prefetch_steps` (steps read ahead by each worker) changes what is read.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        dp_rank: int,
        dp_size: int,
        micro_batch_sequences: int,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        state: StreamState | None = None,
        max_bad_documents: int = 100,
    ) -> None:
        """Raises ConfigError for a step that ranks and micro-batches do not divide, or a foreign state."""
        _check_division(stream.sequences_per_step, dp_size, micro_batch_sequences)
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank = {dp_rank}: legal are 0 ... {dp_size - 1}")
        self._state = state or stream.start()
        stream.check(self._state)
        self._micro_batch_sequences = micro_batch_sequences
        self._max_bad_documents = max_bad_documents
        self.bad_documents: list[str] = []
        """Names of all documents that could not be read so far, in order."""
        self._ahead: deque[_StepFacts] = deque()
        reader = _Reader(stream)
        positions = np.arange(dp_rank, stream.sequences_per_step, dp_size)
        plans = _plan_ahead(stream, self._state, positions, self._ahead)
        if num_workers == 0:
            self._results: Iterator[Any] = (reader[plan] for plan in plans)
            self._close: Callable[[], object] = lambda: None
        else:
            self._results = start_readers(reader, plans, num_workers, prefetch_steps)
            self._close = weakref.finalize(self, stop_readers, self._results)

    def next_step(self) -> StepBatch:
        """The next step. Raises ReaderDied after a worker was killed, WrongChecksum for too many bad ones."""
        began = time.perf_counter()
        with explained_deaths():
            result = next(self._results)
        if isinstance(result, Exception):
            raise result
        batch, bad = result
        self._note_bad(bad)
        step = self._micro_batch_sequences
        micro_batches = tuple(batch.rows(i, i + step) for i in range(0, batch.num_sequences, step))
        self._state, fill_frac, epochs = self._ahead.popleft()
        return StepBatch(
            micro_batches, self._state, time.perf_counter() - began, fill_frac, epochs, tuple(bad)
        )

    def _note_bad(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.bad_documents:
                self.bad_documents.append(name)
                print(
                    f"data: {name} is not what was indexed (crc32); padding without loss stands in its place "
                    f"({len(self.bad_documents)} so far)",
                    file=sys.stderr,
                    flush=True,
                )
        if len(self.bad_documents) > self._max_bad_documents:
            raise WrongChecksum(
                f"{len(self.bad_documents)} documents differ from what was indexed (crc32), and "
                f"{self._max_bad_documents} are allowed; the first: {', '.join(self.bad_documents[:3])}. "
                f"The shards were damaged or replaced: restore them, or tokenize again"
            )

    @property
    def state(self) -> StreamState:
        """After the last step that next_step gave."""
        return self._state

    def close(self) -> None:
        """Stop the workers and wait for them. Safe to call twice."""
        self._close()

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


class _StepFacts(NamedTuple):
    """What the plan of a step says of it, kept until the step has been read."""

    state_after: StreamState
    fill_frac: float
    epochs: tuple[float, ...]


def _plan_ahead(
    stream: Stream, state: StreamState, positions: np.ndarray, ahead: deque[_StepFacts]
) -> Iterator[BlockPlan]:
    """One rank's share of each step from `state` on; it runs ahead of next_step by what workers prefetch."""
    total = stream.sequences_per_step * stream.context_tokens
    while True:
        plan, state = stream.plan_step(state)
        ahead.append(_StepFacts(state, plan.filled_slots / total, stream.epochs(state)))
        yield plan.take(positions)


class _Reader(Dataset[Any]):
    """Map-style: a plan -> (Batch, names of bad documents), or the exception, so that it arrives as it is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    def __getitem__(self, plan: BlockPlan) -> "tuple[Batch, list[str]] | Exception":
        try:
            return read(self._stream, plan)
        except (ConfigError, OSError) as error:
            return error


def read(stream: Stream, plan: BlockPlan) -> tuple[Batch, list[str]]:
    """The sequences of a plan as one Batch, and the names of documents whose bytes are not those indexed.

    Such a document leaves padding of its length, without loss, at the end of its sequence; no other sequence
    is touched.
    """
    sequences: list[list[np.ndarray]] = []
    samples: list[list[str]] = []
    bad: list[str] = []
    pieces = list(
        zip(
            plan.source.tolist(),
            plan.document.tolist(),
            plan.start.tolist(),
            plan.slots.tolist(),
            strict=True,
        )
    )
    first = plan.first.tolist()
    for begin, end in pairwise(first):
        documents, names = [], []
        for source, document, start, slots in pieces[begin:end]:
            name, ids = stream.sources[source].fetch(document)
            if ids is None:
                bad.append(name)
                continue
            documents.append(ids[start : start + slots + 1])
            names.append(name)
        sequences.append(documents)
        samples.append(names)
    batch = make_batch(
        sequences, sequence_tokens=stream.context_tokens, vocabulary=stream.vocabulary, samples=samples
    )
    return batch, bad


def sequences(
    stream: Stream, *, dp_rank: int = 0, dp_size: int = 1, state: StreamState | None = None
) -> Callable[[], Iterator[dict[str, Any]]]:
    """First stage of a webdataset pipeline: `wds.DataPipeline(sequences(stream), wds.map(f), ...)`.

    Yields one packed sequence after another, each a sample with "__key__" (its number in the stream) and the
    fields of Batch as arrays [S]. Stages that map one sample to one keep order and place; `shuffle`,
    `select` and the like give both up. Reads in the process that iterates: in a DataLoader with several
    workers it raises ConfigError.
    """

    def stage() -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                "sequences(): more than one worker would repeat the data; use Loader(num_workers=...)"
            )
        with Loader(stream, dp_rank=dp_rank, dp_size=dp_size, micro_batch_sequences=1, state=state) as loader:
            while True:
                number = loader.state.sequences + dp_rank
                for i, batch in enumerate(loader.next_step().micro_batches):
                    arrays = {name: value[0] for name, value in vars(batch).items()}
                    yield {"__key__": f"{number + i * dp_size:012d}", **arrays}

    return stage
