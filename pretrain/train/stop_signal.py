"""A wish to stop, taken at a signal and acted on between steps. Imports no torch."""

import os
import signal
from dataclasses import dataclass, field
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


@dataclass
class StopSignal:
    """The first signal counts; later ones change nothing, so that none can break a save.

    A scheduler that loses patience sends SIGKILL, harmless at any moment: see pretrain/checkpoint/save.py.
    """

    received: list[str] = field(default_factory=list)

    @classmethod
    def install(cls) -> "StopSignal":
        """Catch SIGTERM, SIGUSR2 (Slurm's --signal) and SIGINT from here on."""
        stop = cls()
        for number in STOP_SIGNALS:
            signal.signal(number, stop._remember)
        return stop

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        first = not self.received
        self.received.append(signal.Signals(number).name)
        if first:
            # os.write: print may be what the signal interrupted, and refuses to be entered twice.
            os.write(2, f"motley: {self.received[0]}: saving after this step\n".encode())

    @property
    def requested(self) -> bool:
        return bool(self.received)


def ignore_from_here_on() -> None:
    """For a process whose exit code is decided. A launcher that ends all ranks once one has left (srun
    --kill-on-bad-exit) would else kill this one in its last moments, when Python has let go of its handlers,
    and report a signal instead of the code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
