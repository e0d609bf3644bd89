"""Starting ranks on this machine and waiting for all of them. It imports no torch, so that it stays light."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from parallel.exit_codes import ExitCode
from parallel.launch import child_environment, die_with_parent, open_store_socket, rank_environment
from parallel.rank_end import EndRecord, first_failure, rank_ends

FORWARDED_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
_POLL_S = 0.05


@dataclass(frozen=True)
class Ended:
    """The result of `spawn` says how its ranks ended."""

    exit_code: int
    """0; 85 if a signal stopped them; or the code of the rank that failed first (128 + signal if it was
    killed)."""
    rank: int | None = None
    """The rank that failed first, or that was stopped without a checkpoint; None: there was none."""
    cause: str | None = None
    """Why, as one line."""


@dataclass
class _Rank:
    process: "subprocess.Popen[bytes]"
    sent: set[int] = field(default_factory=set)
    """The signals that `spawn` has sent to it."""

    def send(self, number: int) -> None:
        self.sent.add(number)
        self.process.send_signal(number)


def spawn(argv: Sequence[str], processes: int, *, threads: int | None = None, grace_s: float = 10.0) -> Ended:
    """Run `python ARGV...` as `processes` ranks on this machine and wait for all of them.

    SIGTERM, SIGUSR2 and SIGINT are forwarded to all ranks. When a rank fails, the others get SIGTERM, and
    SIGKILL `grace_s` later; when a rank has stopped at a signal, the others get the SIGKILL alone, for they
    may hang. Ranks leave end records (parallel/rank_end.py), which tell the rank that failed first from
    those that lost it. A forwarded signal that killed a rank, because it handled none yet, has stopped it.
    """
    received: list[int] = []

    def remember(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    previous = {number: signal.signal(number, remember) for number in FORWARDED_SIGNALS}
    ranks: list[_Rank] = []
    try:
        with open_store_socket() as store, tempfile.TemporaryDirectory(prefix="motley-ends-") as ends:
            base, parent = child_environment(processes, threads=threads), os.getpid()
            for rank in range(processes):
                process = subprocess.Popen(
                    [sys.executable, *argv],
                    env=base | rank_environment(rank, processes, store, ends),
                    pass_fds=(store.fileno(),) if rank == 0 else (),
                    # In its own group a rank gets Ctrl-C of a terminal once, forwarded by this process.
                    process_group=0,
                    preexec_fn=lambda: die_with_parent(parent),
                )
                ranks.append(_Rank(process))
            codes = _wait(ranks, received, grace_s, ends)
            return _verdict(ranks, codes, rank_ends(Path(ends)))
    finally:
        for rank in ranks:
            if rank.process.poll() is None:
                rank.process.kill()
                rank.process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[_Rank], received: list[int], grace_s: float, ends: str) -> list[int]:
    """Wait for all ranks and forward the signals in `received`; returns the exit codes of the ranks, 85 for a
    rank that a signal of this process has killed."""
    codes: dict[int, int] = {}
    deadline = float("inf")
    running = dict(enumerate(ranks))
    while running:
        while received:
            number = received.pop(0)
            for rank in running.values():
                rank.send(number)
        for number, rank in list(running.items()):
            if (code := rank.process.poll()) is None:
                continue
            del running[number]
            codes[number] = code = ExitCode.REQUEUE if -code in rank.sent else _exit_code(code)
            if code == ExitCode.DONE:
                continue
            deadline = min(deadline, time.monotonic() + grace_s)
            if code == ExitCode.REQUEUE:
                continue
            _record(ends, number, rank.process)
            for other in running.values():
                if signal.SIGTERM not in other.sent:
                    other.send(signal.SIGTERM)
        if time.monotonic() > deadline:
            for rank in running.values():
                rank.send(signal.SIGKILL)
        if running:
            time.sleep(_POLL_S)
    return [codes[number] for number in range(len(ranks))]


def _record(ends: str, rank: int, process: "subprocess.Popen[bytes]") -> None:
    """Write the end record of a failed rank that has left none, for other ranks to see that it is gone."""
    own = next((end["kind"] for end in rank_ends(Path(ends)) if end["rank"] == rank), None)
    if own not in (None, "done", "stopped"):
        return
    code = process.returncode
    kind, message = "error", f"exited with code {code}"
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        kind, message = "killed", f"by {names.get(-code, f'signal {-code}')}"
        message += ", perhaps by the kernel for want of memory" if -code == signal.SIGKILL else ""
    message += f" (pid {process.pid})" + (", after its work was done" if own else "")
    EndRecord(ends, rank).close(exit_code=_exit_code(code), kind=kind, message=message, step=None)


def _exit_code(code: int) -> int:
    """128 + the number of the signal for a process that a signal has killed."""
    return 128 - code if code < 0 else code


def _verdict(ranks: Sequence[_Rank], codes: Sequence[int], ends: Sequence[dict[str, Any]]) -> Ended:
    """Tell from exit codes and end records what became of the ranks."""
    if (failed := first_failure(ends)) is not None:
        return Ended(failed["exit_code"], failed["rank"], _line(failed, ranks))
    for number, code in enumerate(codes):
        if code not in (ExitCode.DONE, ExitCode.REQUEUE):  # there was no room for a record
            return Ended(code, number, f"rank {number} of {len(ranks)}: ended with code {code}")
    if ExitCode.REQUEUE not in codes:
        return Ended(ExitCode.DONE)
    stopped = [end for end in ends if end["kind"] == "stopped"]
    if not stopped:
        return Ended(ExitCode.REQUEUE, None, "a signal stopped the ranks before they could listen")
    if (unsaved := next((end for end in stopped if end["step"] is None), None)) is None:
        return Ended(ExitCode.REQUEUE)
    hung = [str(number) for number, rank in enumerate(ranks) if signal.SIGKILL in rank.sent]
    killed = f"; killed what did not end: rank {', '.join(hung)}" if hung else ""
    return Ended(ExitCode.REQUEUE, unsaved["rank"], _line(unsaved, ranks) + killed)


def _line(end: dict[str, Any], ranks: Sequence[_Rank]) -> str:
    """One line for people, such as "rank 1 of 2: data: tokens-0000.tar: ..." or "rank 1 of 2: killed by
    SIGSEGV"."""
    what = {"stopped": "", "killed": "killed "}.get(end["kind"], f"{end['kind'].replace('_', ' ')}: ")
    return f"rank {end['rank']} of {len(ranks)}: {what}{end['message']}"
