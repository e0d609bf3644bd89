"""srun, and an eye on what it started: ranks that hang in silence are ended. Imports no torch.

A collective that waits for a rank that stands still, a file system that does not answer, a node whose daemon
was lost (srun then waits for ever) all look the same: the job runs, and nothing is written.
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
"""srun's --wait: from the end of the first task to that of the others, which it then ends."""
_PATIENCE_S = 30
"""Beyond WAIT_S: srun itself no longer does what it is there for."""
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
    """Run srun, its stderr to the file `errors`: (its exit code, what `hang` said if that ended it).

    `hang` is asked again and again; once it says something, the step is ended by `end_step`, and srun too if
    it stays.
    """
    with errors.open("ab") as file:
        srun = subprocess.Popen(command, env=dict(environment), stdin=subprocess.DEVNULL, stderr=file)
    found: str | None = None
    deadline = float("inf")
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = srun.wait(_POLL_S)
            return (128 - code if code < 0 else code), found
        if found is None:
            if (found := hang()) is not None:
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
    """A function that says what is wrong once ranks hang, None so long as they do not.

    `errors`: of srun. `wait_s`: from the first sign that a rank has ended. `hang_after_s` 0: silence is none.
    `clock` returns seconds.
    """
    # Looks are seldom: they are stats of every file of an attempt, on a file system that others use.
    look_s, poll_s = min(5.0, wait_s / 10), min(60.0, hang_after_s / 10)
    seen, changed = _signature(attempt_dir, run_dir), clock()
    looked, polled, first_end = changed, changed, float("inf")

    def hang() -> str | None:
        nonlocal seen, changed, looked, polled, first_end
        now = clock()
        if now - looked >= look_s:
            looked = now
            if any(attempt_dir.glob("rank*.end.json")) or _ENDED.search(errors.read_text(errors="replace")):
                first_end = min(first_end, now)
            if now - first_end > wait_s:
                return f"a rank ended, and srun still waits for others {wait_s:g} s later: their node is lost"
        if hang_after_s and now - polled >= poll_s:
            polled = now
            if (found := _signature(attempt_dir, run_dir)) != seen:
                seen, changed = found, now
            elif now - changed >= hang_after_s:
                return f"no log, metrics or checkpoint was written to for {hang_after_s:g} s (hang_after_s)"
        return None

    return hang


def _signature(attempt_dir: Path, run_dir: Path) -> tuple[int, int, int]:
    """Changes with whatever a rank writes: count, sum of sizes and newest time of its files."""
    count = size = newest = 0
    for path in _files(attempt_dir, run_dir):
        with contextlib.suppress(OSError):  # renamed meanwhile, which the next look sees
            state = path.stat()
            count, size, newest = count + 1, size + state.st_size, max(newest, state.st_mtime_ns)
    return count, size, newest


def _files(attempt_dir: Path, run_dir: Path) -> Iterable[Path]:
    yield from attempt_dir.glob("*")
    yield run_dir / METRICS
    checkpoints = run_dir / CHECKPOINTS
    yield checkpoints
    for unfinished in checkpoints.glob(f"{SAVING}*"):
        for folder, _, names in os.walk(unfinished):
            yield from (Path(folder, name) for name in names)
