"""Real training processes without their seconds of imports (tests/warm_python.py).

Each rank is a process of its own in a session of its own, which a test may signal and kill.
"""

import contextlib
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from parallel import launch
from tests import warm_python

REPOSITORY = Path(__file__).parents[2]
TIMEOUT_S = 90.0


class Run:
    """`motley train ARGV` on `processes` ranks; what they print is in `output`.

    `verb`: another verb of motley, in one process. `drawn`: whether its report has figures. `disk`: the
    fields of a DiskFault (tests/faults/injected_disk.py), as JSON, that rank `on_rank` meets. `spikes`: what
    all ranks meet (tests/e2e/injected_spike.py), as JSON.
    """

    def __init__(
        self,
        argv: Sequence[str],
        output: Path,
        *,
        processes: int = 1,
        verb: str = "train",
        drawn: bool = True,
        disk: str | None = None,
        on_rank: int = 0,
        spikes: str | None = None,
    ) -> None:
        self.output = output
        module = ["tools.cli", verb] if processes == 1 else ["pretrain.train"]
        faulty = [] if disk is None else ["tests.faults.injected_disk", disk]
        undrawn = [] if drawn else ["tests.undrawn"]
        leaping = [] if spikes is None else ["tests.e2e.injected_spike", spikes]
        base = launch.child_environment(2, threads=1) | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        with launch.open_store_socket() as store, output.open("ab") as out, open(os.devnull) as nothing:
            files = {0: nothing.fileno(), 1: out.fileno(), 2: out.fileno(), store.fileno(): store.fileno()}
            self._ranks = [
                warm_python.start(
                    warm_python.server(),
                    ["-m", *leaping, *(faulty if rank == on_rank else []), *undrawn, *module, *argv],
                    base | (launch.rank_environment(rank, processes, store) if processes > 1 else {}),
                    str(REPOSITORY),
                    files,
                )
                for rank in range(processes)
            ]
        self.pids = [rank.pid for rank in self._ranks]

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one rank, or to all."""
        for pid in self.pids if rank is None else [self.pids[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Look every 2 ms: a save of so small a model takes ten times as long, and to look takes time too."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"waited in vain; {self.text()}"
            assert not self._ranks[0].ended(), f"ended too early; {self.text()}"
            time.sleep(0.002)

    def wait_for_any(self) -> None:
        """Wait until one of the ranks has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while not any(rank.ended() for rank in self._ranks) and time.monotonic() < deadline:
            time.sleep(0.01)

    def codes(self) -> list[int]:
        """Wait for all ranks; their exit codes, negative for a signal."""
        return [rank.wait(TIMEOUT_S) for rank in self._ranks]

    def code(self, rank: int) -> int:
        """Wait for one rank; its exit code, negative for a signal."""
        return self._ranks[rank].wait(TIMEOUT_S)

    def text(self) -> str:
        return self.output.read_text()


def train(argv: Sequence[str], output: Path, *, processes: int = 1, spikes: str | None = None) -> None:
    """Run to the end, which must be a good one."""
    run = Run(argv, output, processes=processes, spikes=spikes)
    assert run.codes() == [0] * processes, run.text()
