"""The watchdog: it runs srun, and ends ranks that hang. This module imports no torch.

A collective that waits for a stuck rank, a file system that does not answer and a node whose daemon was lost
(srun then waits for ever) all look the same: the job runs, and nothing is written.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pretrain.checkpoint.folder import SAVING
from pretrain.run_files import CHECKPOINTS, METRICS

WAIT_S = 60
"""srun's --wait: seconds from the end of the first task until srun ends the other tasks."""
_PATIENCE_S = 30
"""Seconds beyond WAIT_S after which srun itself is taken to hang."""
_POLL_S = 0.5
_ENDED = re.compile(r"^srun: error: .*\btasks? [\d,\[\]-]+: ", re.MULTILINE)


def run_step(
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    errors: Path,
    hang: Callable[[], str | None],
    end_step: Callable[[], None],
) -> tuple[int, str | None]:
    """Run srun with its stderr in the file `errors`: (its exit code, the text of `hang` if that ended it).

    `hang` is called every half second. Once it returns a text, `end_step` ends the step, and srun is killed
    if it stays.
    """
    with errors.open("ab") as file:
        srun = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stderr=file)
    hang_text: str | None = None
    deadline = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(_POLL_S)
            return (128 - code if code < 0 else code), hang_text
        if hang_text is None:
            if (hang_text := hang()) is not None:
                end_step()
                deadline = time.monotonic() + _PATIENCE_S
        elif time.monotonic() > deadline:
            srun.kill()


def watch(
    attempt_dir: Path,
    run_dir: Path,
    errors: Path,
    hang_after_s: float,
    *,
    wait_s: float = WAIT_S + _PATIENCE_S,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], str | None]:
    """A function that returns None while ranks work, and the problem in words once they hang.

    `errors`: the file of srun's stderr. `wait_s`: seconds that srun may take to end after a rank has ended.
    `hang_after_s`: seconds without any write after which ranks are taken to hang; 0: no limit. `clock`
    returns seconds.
    """
    # It polls rarely, because a poll stats every file of the attempt on a shared file system.
    ends_poll_s, poll_s = min(5.0, wait_s / 10), min(60.0, hang_after_s / 10)
    seen, changed = _signature(attempt_dir, run_dir), clock()
    ends_polled, polled, first_end = changed, changed, float("inf")

    def hang() -> str | None:
        nonlocal seen, changed, ends_polled, polled, first_end
        now = clock()
        if now - ends_polled >= ends_poll_s:
            ends_polled = now
            if any(attempt_dir.glob("rank*.end.json")) or _ENDED.search(errors.read_text(errors="replace")):
                first_end = min(first_end, now)
            if now - first_end > wait_s:
                return f"a rank ended, and srun still waits for others {wait_s:g} s later: their node is lost"
        if hang_after_s and now - polled >= poll_s:
            polled = now
            if (signature := _signature(attempt_dir, run_dir)) != seen:
                seen, changed = signature, now
            elif now - changed >= hang_after_s:
                return f"no log, metrics or checkpoint was written to for {hang_after_s:g} s (hang_after_s)"
        return None

    return hang


def _signature(attempt_dir: Path, run_dir: Path) -> tuple[int, int, int]:
    """(number, total size, newest time) of the files that ranks write; it changes with every write."""
    count = size = newest = 0
    for path in _files(attempt_dir, run_dir):
        with contextlib.suppress(OSError):  # renamed in between, which the next poll sees
            state = path.stat()
            count, size, newest = count + 1, size + state.st_size, max(newest, state.st_mtime_ns)
    return count, size, newest


def _files(attempt_dir: Path, run_dir: Path) -> Iterable[Path]:
    """The files and folders that ranks write: logs, metrics and checkpoints."""
    yield from attempt_dir.glob("*")
    yield run_dir / METRICS
    checkpoints = run_dir / CHECKPOINTS
    yield checkpoints
    for unfinished in checkpoints.glob(f"{SAVING}*"):
        for folder, _, names in os.walk(unfinished):
            yield from (Path(folder, name) for name in names)
