"""Samples are decoded in a child process, so that a crash or a hang of a decoder costs one sample.

    this process                                    its child
    ------------                                    ---------
    fork                                   ->       read the shards, from the first sample on
                                                    note in shared memory which sample comes next, decode it
                                           <-       what became of the last few samples
    the child died: the note says at which
    sample; fork a child that refuses it   ->       read on behind what was sent

The child sets an alarm before it decodes a sample. The kernel then ends the child, whatever a decoder written
in C does at that time. What travels back is small: token ids, where raw files are pictures and sound.
"""

import mmap
import multiprocessing
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Location, Sample, ShardError, prepare_to_open
from data_pipeline.tokenize.layout import RAW, SourceSettings
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.readers import read_raw

Result = TypeVar("Result")
LOST_IN_A_ROW = 8
"""So many samples in a row that end their process are no fault of the samples."""
_SENT_SAMPLES, _SENT_BYTES = 32, 1 << 20
"""Outcomes are sent together, of at most so many samples, or when the raw files behind them are so large."""


@dataclass(frozen=True)
class Refused:
    """A sample that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class _Work:
    """The work says which samples a child decodes, and with which function and limits."""

    shards: Sequence[Location]
    use: Callable[[str, Sample], Any]
    limits: Limits
    per_shard: int | None
    source: SourceSettings


class _Note:
    """The number of the sample that a child is at, in memory that outlives it: (shard, sample), from 0.

    The sample is counted over all shards; -1: the child is between two samples.
    """

    _FORM = struct.Struct("qq")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self._FORM.size)

    def write(self, shard: int, sample: int) -> None:
        self._FORM.pack_into(self._memory, 0, shard, sample)

    def read(self) -> tuple[int, int]:
        shard, sample = self._FORM.unpack_from(self._memory)
        return shard, sample


def use_samples(
    shards: Sequence[Location],
    use: Callable[[str, Sample], Result],
    limits: Limits,
    *,
    per_shard: int | None = None,
    source: SourceSettings = RAW,
) -> Generator[tuple[Location, str, Result | Refused], None, None]:
    """(shard, key, use(key, sample)) for every sample of the shards, in order; of each shard, for its first
    `per_shard` samples. `source` says what a sample is.

    A sample is Refused where `use` raises, takes longer than limits.sample_timeout_s, or ends its process.
    What `use` changes there is lost; its results must be picklable. Raises ShardError for a shard that cannot
    be read, ConfigError where LOST_IN_A_ROW samples in a row end their process.
    """
    prepare_to_open(shards)
    work, lost, num_done = _Work(shards, use, limits, per_shard, source), dict[int, str](), 0
    while True:
        (receiver, sender), note = multiprocessing.Pipe(duplex=False), _Note()
        child = multiprocessing.get_context("fork").Process(
            target=_child, args=(receiver, sender, note, work, num_done, lost)
        )
        child.start()
        sender.close()
        try:
            for sent in _received(receiver):
                if isinstance(sent, ConfigError):
                    raise sent
                num_done += len(sent)
                yield from sent
            child.join()
        finally:
            receiver.close()
            child.kill()
            child.join()
        if not child.exitcode:
            return
        shard, sample = note.read()
        lost[sample] = f"its decoder {_reason(child.exitcode, limits)}"
        _check_lost(shards[shard], sample, lost)


def _received(receiver: Connection) -> Iterator[Any]:
    """Yield what a child sends, until it ends."""
    while True:
        try:
            yield receiver.recv()
        except (EOFError, ConnectionResetError):
            return


def _check_lost(shard: Location, sample: int, lost: Mapping[int, str]) -> None:
    """Raise ShardError or ConfigError where the loss of a process is not the fault of one sample."""
    if sample < 0:
        raise ShardError(f"{shard}: cannot be read: {lost[sample]}")
    if all(sample - back in lost for back in range(LOST_IN_A_ROW)):
        raise ConfigError(
            f"{shard}: {lost[sample]}, as for the {LOST_IN_A_ROW - 1} samples before it: look for the "
            "fault in this machine or in a tokenizer, or raise the limit in [limits]"
        )


def _child(
    receiver: Connection,
    sender: Connection,
    note: _Note,
    work: _Work,
    start: int,
    lost: Mapping[int, str],
) -> None:
    """Use the samples from number `start` on but for the `lost` ones, and send what becomes of them."""
    receiver.close()  # so that this process ends when its parent is gone and nobody receives
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory(work.limits)
    outcomes: list[tuple[Location, str, Any]] = []
    number, num_bytes = -1, 0
    try:
        for index, shard in enumerate(work.shards):
            note.write(index, -1)
            samples = read_raw(shard, work.source, work.limits.sample_bytes)
            for key, sample in islice(samples, work.per_shard):
                number += 1
                if number < start:
                    continue
                if number in lost:
                    outcome = Refused(lost[number])
                else:
                    note.write(index, number)
                    outcome = _outcome(work, key, sample)
                    note.write(index, -1)
                outcomes.append((shard, key, outcome))
                num_bytes += sum(len(content) for content in sample.values() if content is not None)
                if len(outcomes) == _SENT_SAMPLES or num_bytes > _SENT_BYTES:
                    sender.send(outcomes)
                    outcomes, num_bytes = [], 0
        sender.send(outcomes)
    except BrokenPipeError:
        return
    except ConfigError as error:
        sender.send(outcomes)
        sender.send(error)


def _outcome(work: _Work, key: str, sample: Sample) -> Any:
    """Return what `use` makes of a sample in time; an alarm ends this process otherwise."""
    signal.setitimer(signal.ITIMER_REAL, work.limits.sample_timeout_s)
    try:
        return work.use(key, sample)
    except SampleError as error:
        return Refused(str(error))
    except Exception as error:  # of a decoder or of a tokenizer, for which this sample was too much
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Refused(str(SampleError(f"{type(error).__name__} in {where}: {error}")))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _reason(exit_code: int, limits: Limits) -> str:
    """Say what became of a process that ended before it was done, as the end of a sentence."""
    if exit_code == -signal.SIGALRM:
        return f"took longer than limits.sample_timeout_s = {limits.sample_timeout_s:g}"
    if exit_code == -signal.SIGKILL:
        return "was killed, most often for want of memory"
    return f"crashed ({signal.Signals(-exit_code).name})" if exit_code < 0 else f"exited with {exit_code}"


def _limit_memory(limits: Limits) -> None:
    """Let this process allocate limits.sample_memory_gib more than it has, where the system can tell."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return
    (used_kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmData:"))
    wanted = used_kib * 1024 + int(limits.sample_memory_gib * (1 << 30))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    if most == resource.RLIM_INFINITY or wanted < most:
        resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
