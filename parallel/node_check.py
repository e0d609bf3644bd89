"""The check of a node before ranks start: `python -m parallel.node_check SPEC.json`, as one task per node.

A node checks itself and then meets the others at the address that ranks will use. Its result is an answer
file, which is written again at every stage, so that the answer of a node that hangs shows the stage it
reached.

Two things are not checked. GPUs beyond the first take no part in the sum over nodes, so links between the
GPUs of a node, and network cards that only these GPUs use, are not tested. Free space is that of the file
system, without quotas. torch is imported only when it is needed.
"""

import faulthandler
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from parallel import launch
from parallel.rank_end import kind_of_error, one_line

STAGES = ("started", "local", "met", "done")
"""The stages of a check: the task runs; the node has checked itself; it has met the others; it is done."""
TOKEN = "token"
_GIB = 1 << 30
_SUM_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Spec:
    """The settings of a check."""

    token: str
    """Content of the file TOKEN beside the folder `answers`, which shows that nodes share a file system."""
    answers: str
    """Folder of the answers, <node>.json, on a file system that all nodes share."""
    gpus: int
    """Number of GPUs that a node must have; 0: GPUs are not checked."""
    min_free_gpu_gib: float
    min_free_disk_gib: dict[str, float]
    """Free space by path. Too little on the file system of `answers` is a shared problem."""
    max_clock_skew_s: float
    """Largest difference of a node's clock from the median of all nodes."""
    all_reduce: bool
    """Whether nodes meet. If not, neither clocks nor the network are checked."""
    timeout_s: int
    """The process is ended after this time."""


def check(spec: Spec, node: str, facts: launch.RankFacts, clock: Callable[[], float] = time.time) -> None:
    """Check this node and write its answer, again at every stage. Raises OSError if it cannot be written.

    The answer holds the last "stage", "problems" of the node, "shared" problems of all nodes, "error" (why
    the check stopped, perhaps through another node's fault), "clock_skew_s", "all_reduce_s" and "seconds"
    taken.
    """
    began = time.monotonic()
    problems: list[str] = []
    shared: list[str] = []
    answer: dict[str, Any] = {"node": node, "problems": problems, "shared": shared, "error": None}
    answer |= {"clock_skew_s": None, "all_reduce_s": None}

    def reached(stage: str) -> None:
        answer.update(stage=stage, seconds=round(time.monotonic() - began, 3))
        path = Path(spec.answers) / f"{node}.json"
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(json.dumps(answer))
        unfinished.replace(path)

    reached("started")
    problems += _token(spec)
    for path, needed_gib in spec.min_free_disk_gib.items():
        if low := _low_disk(path, needed_gib):
            (shared if _is_same_disk(path, spec.answers) else problems).append(low)
    try:
        if spec.gpus or spec.all_reduce:
            import torch  # noqa: F401
    except (ImportError, OSError) as error:
        problems.append(f"cannot import torch: {one_line(str(error))}")
        reached("local")
        return
    problems += _gpus(spec)
    reached("local")
    if not spec.all_reduce or _meet_others(spec, facts, answer, reached, clock):
        reached("done")


def _meet_others(
    spec: Spec,
    facts: launch.RankFacts,
    answer: dict[str, Any],
    reached: Callable[[str], None],
    clock: Callable[[], float],
) -> bool:
    """Compare clocks and sum with the other nodes, and add the results to `answer`; False if that failed."""
    fine = not (answer["problems"] or answer["shared"])
    try:
        answer["clock_skew_s"], answer["all_reduce_s"] = _together(
            spec, facts, fine, lambda: reached("met"), clock
        )
    except (RuntimeError, ValueError) as error:
        message = one_line(f"{type(error).__name__}: {error}")
        if kind_of_error(error) == "lost_peer" and not _is_in_use(error):
            answer["error"] = message
        else:
            answer["problems"].append(f"cannot work with the other nodes: {message}")
        reached(answer["stage"])
        return False
    skew = answer["clock_skew_s"]
    if abs(skew) > spec.max_clock_skew_s:
        where = "ahead of" if skew > 0 else "behind"
        limit = f"{spec.max_clock_skew_s:.1f} allowed ([preflight] max_clock_skew_s)"
        answer["problems"].append(f"its clock is {abs(skew):.1f} s {where} the others', {limit}")
    return True


def _token(spec: Spec) -> list[str]:
    """A problem if this node does not see the run directory of the first node."""
    folder = Path(spec.answers).parent
    with suppress(OSError):
        if (folder / TOKEN).read_text() == spec.token:
            return []
    return [f"does not see {folder} as the first node does: the run directory is not on a shared file system"]


def _low_disk(path: str, needed_gib: float) -> str | None:
    """The problem if a file system has too little free space."""
    needed = f"{needed_gib:g} GiB wanted ([preflight] of the profile)"
    try:
        free = shutil.disk_usage(path).free / _GIB
    except OSError as error:
        return f"{path}: {error.strerror}; {needed}"
    return None if free >= needed_gib else f"{free:.1f} GiB free under {path}, {needed}"


def _is_same_disk(path: str, other: str) -> bool:
    return os.path.exists(path) and os.stat(path).st_dev == os.stat(other).st_dev


def _gpus(spec: Spec) -> list[str]:
    """The problems of this node's GPUs: too few, broken, or without enough free memory."""
    if not spec.gpus:
        return []
    import torch

    visible = torch.cuda.device_count()
    problems = [f"{visible} GPUs visible, {spec.gpus} wanted"] if visible < spec.gpus else []
    for index in range(visible):
        try:
            free = torch.cuda.mem_get_info(index)[0] / _GIB
            torch.ones(1 << 20, device=f"cuda:{index}").sum().cpu()  # this fails on a broken GPU
        except RuntimeError as error:
            problems.append(f"GPU {index}: {one_line(str(error))}")
        else:
            if free < spec.min_free_gpu_gib:
                wanted = f"{spec.min_free_gpu_gib:g} wanted ([preflight] min_free_gpu_gib)"
                problems.append(f"GPU {index}: {free:.1f} GiB free, {wanted}: another process holds it")
    return problems


def _together(
    spec: Spec, facts: launch.RankFacts, fine: bool, met: Callable[[], None], clock: Callable[[], float]
) -> tuple[float, float | None]:
    """(difference of this clock from the median of all, seconds of a sum over nodes, or None).

    A node with problems (not `fine`) takes part, so that others do not wait for it, but there is no sum then.
    """
    from parallel import world

    # timeout_s ends the process before this timeout does, at the same time on all nodes.
    timeout = timedelta(seconds=2 * spec.timeout_s)
    store = world.open_store(facts, timeout, wait=False)
    met()

    def of_all(name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(facts.world_size)]

    def gathered(name: str, value: str) -> list[str]:
        store.set(f"{name}/{facts.rank}", value)
        store.wait(of_all(name))
        return [content.decode() for content in store.multi_get(of_all(name))]

    all_fine = gathered("fine", str(fine)).count("True") == facts.world_size
    now = clock()  # all nodes are here at the same time
    skew = now - statistics.median(map(float, gathered("clock", repr(now))))
    seconds = _all_reduce(facts, timeout, store) if all_fine else None
    with suppress(RuntimeError):
        gathered("through", "")
        store.set(f"left/{facts.rank}", "")
        if facts.rank == 0:  # it holds the store, so it leaves last
            store.wait(of_all("left"))
    return skew, seconds


def _all_reduce(facts: launch.RankFacts, timeout: timedelta, store: Any) -> float:
    """Seconds of a sum over the nodes, with the library that ranks use. Raises ValueError for a wrong sum."""
    import torch
    import torch.distributed as dist

    from parallel import world

    device = launch.choose_device(facts)
    world.meet(facts, device, timeout, store)
    values = torch.full((_SUM_ELEMENTS,), facts.rank + 1.0, device=device)
    began = time.monotonic()
    dist.all_reduce(values)
    lowest, highest = values.aminmax()
    right = facts.world_size * (facts.world_size + 1) / 2
    if (extremes := (lowest.cpu().item(), highest.cpu().item())) != (right, right):
        raise ValueError(f"a sum over the nodes gave {extremes[0]:g} to {extremes[1]:g}, {right:g} is right")
    return time.monotonic() - began


def _is_in_use(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error)


def _read(path: Path, patience_s: float = 30.0) -> Spec:
    """Read the spec, and wait for it if a network file system shows it late."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            return Spec(**json.loads(path.read_text()))
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    name = launch.node_name()
    try:
        spec = _read(Path(sys.argv[1]))
        # This timer runs in C, so it ends even an import that hangs, and prints where. Only it exits with 1.
        faulthandler.dump_traceback_later(spec.timeout_s, exit=True)
        check(spec, name, launch.rank_facts())
    except OSError as error:
        reason = "the run directory is not on a shared file system, or cannot be written here"
        print(f"{name}: does not see {Path(sys.argv[1]).parent}: {reason}: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # connections to peers that may be gone are not waited for
