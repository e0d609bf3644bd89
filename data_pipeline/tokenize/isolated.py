"""Samples are decoded in a child process, so that a crash or a hang of a decoder costs one sample.

    this process                                    its child
    ------------                                    ---------
    fork                                   ->       read the shards, from the first sample on
                                           <-       key of a sample, before it is decoded
                                           <-       what `use` made of it, or why it is refused
    the child died: refuse the sample whose key came last, and fork a child that begins behind it

The child sets an alarm before it decodes a sample. The kernel then ends the child, whatever a decoder written
in C does at that time. What travels back is small: token ids, where raw files are pictures and sound.
"""

import multiprocessing
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.shards.tar import Location, Sample, ShardError, read_samples
from data_pipeline.tokenize.limits import Limits
from data_pipeline.tokenize.raw import SampleError

Result = TypeVar("Result")
LOST_IN_A_ROW = 8
"""So many samples in a row that end their process are no fault of the samples."""


@dataclass(frozen=True)
class Refused:
    """A sample that cannot be used, and why."""

    reason: str


@dataclass(frozen=True)
class _Begun:
    """The child's word that it begins with a sample."""

    shard: Location
    key: str


@dataclass(frozen=True)
class _Made(Generic[Result]):
    """The child's word on the sample that it has begun."""

    outcome: Result | Refused


def use_samples(
    shards: Sequence[Location],
    use: Callable[[str, Sample], Result],
    limits: Limits,
    *,
    per_shard: int | None = None,
) -> Iterator[tuple[Location, str, Result | Refused]]:
    """(shard, key, use(key, sample)) for every sample of the shards, in order, or for the first `per_shard` of
    each shard.

    A sample is Refused where `use` raises an exception, takes longer than limits.sample_timeout_s, or ends its
    process. What `use` changes in its own process is lost; its results must be picklable. Raises ShardError
    for a shard that cannot be read, and ConfigError where LOST_IN_A_ROW samples in a row end their process.
    """
    num_done = in_a_row = 0
    while True:
        begun: _Begun | None = None
        child = _Child(shards, use, limits, per_shard, num_done)
        try:
            for message in child.messages():
                if isinstance(message, Exception):
                    raise message
                if isinstance(message, _Begun):
                    begun = message
                    continue
                assert begun is not None, "a sample is begun before it is made"
                num_done, in_a_row = num_done + 1, 0
                yield begun.shard, begun.key, message.outcome
                begun = None
        finally:
            child.end()
        if child.exit_code == 0:
            return
        reason = _reason(child.exit_code, limits)
        if begun is None:
            raise ShardError(f"{shards[0]} and what follows: the process that reads it {reason}")
        num_done, in_a_row = num_done + 1, in_a_row + 1
        if in_a_row == LOST_IN_A_ROW:
            raise ConfigError(
                f"{begun.shard} {begun.key}: its decoder {reason}, as for the {LOST_IN_A_ROW - 1} samples "
                "before it: look for the fault in this machine or in a tokenizer, or raise the limit in [limits]"
            )
        yield begun.shard, begun.key, Refused(f"its decoder {reason}")


class _Child:
    """A process that uses the samples from number `start` on, and what it has to say."""

    def __init__(
        self,
        shards: Sequence[Location],
        use: Callable[[str, Sample], Any],
        limits: Limits,
        per_shard: int | None,
        start: int,
    ) -> None:
        self._receiver, sender = multiprocessing.Pipe(duplex=False)
        self._process = multiprocessing.get_context("fork").Process(
            target=_work, args=(self._receiver, sender, shards, use, limits, per_shard, start)
        )
        self._process.start()
        sender.close()

    def messages(self) -> Iterator[Any]:
        """What the child sends, until it ends."""
        while True:
            try:
                yield self._receiver.recv()
            except (EOFError, ConnectionResetError):
                self._process.join()
                return

    def end(self) -> None:
        """End the process where it still runs."""
        self._receiver.close()
        self._process.kill()
        self._process.join()

    @property
    def exit_code(self) -> int:
        """0: it has sent all; below 0: a signal."""
        return self._process.exitcode or 0


def _work(
    receiver: Connection,
    sender: Connection,
    shards: Sequence[Location],
    use: Callable[[str, Sample], Any],
    limits: Limits,
    per_shard: int | None,
    start: int,
) -> None:
    """The child: use the samples from number `start` on, and send what comes of them."""
    receiver.close()  # so that this process ends when its parent is gone and nobody receives
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    _limit_memory(limits)
    number = 0
    try:
        for shard in shards:
            samples = read_samples(shard, max_sample_bytes=limits.sample_bytes)
            for key, sample in islice(samples, per_shard):
                number += 1
                if number > start:
                    sender.send(_Begun(shard, key))
                    signal.setitimer(signal.ITIMER_REAL, limits.sample_timeout_s)
                    outcome = _outcome(use, key, sample)
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    sender.send(_Made(outcome))
    except BrokenPipeError:
        return
    except ConfigError as error:
        sender.send(error)


def _outcome(use: Callable[[str, Sample], Any], key: str, sample: Sample) -> Any:
    try:
        return use(key, sample)
    except SampleError as error:
        return Refused(str(error))
    except Exception as error:  # of a decoder or of a tokenizer, for which this sample was too much
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        return Refused(str(SampleError(f"{type(error).__name__} in {where}: {error}")))


def _reason(exit_code: int, limits: Limits) -> str:
    """What became of a process that ended before it was done, as the end of a sentence."""
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
