"""Stopping at a signal: with a checkpoint between steps, or without one where a step does not end.

Python runs the handlers of signals in the main thread, between two of its instructions. While that thread
waits in a collective, none runs. The interpreter does write the number of each signal into a pipe at once,
and a thread reads it there (signal.set_wakeup_fd). Imports no torch.
"""

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
LAST_WORDS = ("SIGTERM", "SIGINT")
"""Signals that end a rank whose step does not end. SIGUSR2 is Slurm's warning, minutes ahead: it can wait."""
GRACE_S = 4.0
"""Seconds from the first of LAST_WORDS until a rank that gets nowhere leaves without a checkpoint. With the
second that it may take to record its end, it is gone within 5 s."""
_POLL_S = 0.2

Stage = Literal[
    "start",
    "step",
    "evaluation",
    "conditional evaluation",
    "evaluation of documents",
    "samples",
    "save",
    "end",
    "over",
]
"""What a rank is doing. "start" and "end" have no step to lose: none is made yet, or all are saved. "over"
is not cut: the rank knows how it ends, and leaves by itself."""


def gets_nowhere(
    now: float, *, asked: float, began: float, longest_s: float, peer_ended: Callable[[], bool]
) -> bool:
    """Whether a rank leaves its stage unfinished. Times are of one clock, in seconds.

    `asked`: when the first of LAST_WORDS came. `began`: when the stage began. `longest_s`: seconds of the
    longest stage of this kind in this attempt. A healthy stage may take twice as long, so that none is cut
    short. `peer_ended`: whether another rank has ended, so that no stage can be finished; asked only after
    GRACE_S.
    """
    return now >= asked + GRACE_S and (now >= began + 2 * longest_s or peer_ended())


@dataclass
class StopSignal:
    """What signals have told this process. The first asks for a checkpoint after this step; none breaks a
    save.

    `leave(why)` ends the process. A scheduler that loses patience sends SIGKILL, harmless at any moment: see
    pretrain/checkpoint/save.py.
    """

    leave: Callable[[str], None]
    peer_ended: Callable[[], bool]
    received: list[str] = field(default_factory=list)
    _asked: float | None = None
    _stage: Stage = "start"
    _began: float = field(default_factory=time.monotonic)
    # The first evaluation is let finish, and so is every save: nothing tells how long they may take. The
    # first step of an attempt has nothing before it that could be lost.
    _longest_s: dict[Stage, float] = field(default_factory=lambda: {"start": 0.0, "step": 0.0, "end": 0.0})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def install(cls, leave: Callable[[str], None], peer_ended: Callable[[], bool]) -> "StopSignal":
        """Catch SIGTERM, SIGUSR2 (Slurm's --signal) and SIGINT from here on."""
        stop = cls(leave, peer_ended)
        numbers, to_thread = os.pipe()
        os.set_blocking(to_thread, False)
        signal.set_wakeup_fd(to_thread, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        threading.Thread(target=stop._listen, args=(numbers,), name="stop signals", daemon=True).start()
        return stop

    @property
    def requested(self) -> bool:
        return bool(self.received)

    def enter(self, stage: Stage) -> None:
        """Note what the rank does from here on. It does not return once the rank is leaving."""
        with self._lock:
            now = time.monotonic()
            if self._stage in ("step", "evaluation", "conditional evaluation", "samples"):
                longest_s = self._longest_s.get(self._stage, 0.0)
                self._longest_s[self._stage] = max(longest_s, now - self._began)
            self._stage, self._began = stage, now

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """A rank that fails is not cut while it leaves: its end record is yet to be written."""
        if kind is not None:
            self.enter("over")

    def _listen(self, numbers: int) -> None:
        """The thread: remember signals, and leave when it is time to."""
        while True:
            ready, _, _ = select.select([numbers], [], [], None if self._asked is None else _POLL_S)
            for number in os.read(numbers, 64) if ready else b"":
                self._remember(signal.Signals(number).name)
            with self._lock:  # held to the end of the process, so that no stage begins any more
                if self._asked is not None and self._gets_nowhere(time.monotonic(), self._asked):
                    stage_s = time.monotonic() - self._began
                    where = "before its first step" if self._stage == "start" else f"in its {self._stage}"
                    self.leave(
                        f"{self.received[0]}: left {where} after {stage_s:.0f} s, without a checkpoint"
                    )

    def _gets_nowhere(self, now: float, asked: float) -> bool:
        longest_s = self._longest_s.get(self._stage, float("inf"))
        return self._stage != "over" and gets_nowhere(
            now, asked=asked, began=self._began, longest_s=longest_s, peer_ended=self.peer_ended
        )

    def _remember(self, name: str) -> None:
        first, self.received = not self.received, [*self.received, name]
        if name in LAST_WORDS and self._asked is None:
            self._asked = time.monotonic()
        if first and self._stage != "over" and not self.peer_ended():  # else nothing is saved
            with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
                for output in {2, sys.stderr.fileno()}:  # the rank's log, and rank 0's terminal
                    # os.write: a print of the main thread may hold the stream's lock.
                    os.write(output, f"motley: {name}: saving after this step\n".encode())


def ignore_from_here_on() -> None:
    """For a process whose exit code is decided. A launcher that ends all ranks once one has left (srun
    --kill-on-bad-exit) would else kill this one in its last moments, when Python has let go of its handlers,
    and report a signal instead of the code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
