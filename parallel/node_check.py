"""A node looks at itself before ranks start, and meets the others: `python -m parallel.node_check SPEC.json`.

A task a node, whose result is its answer: a file written again at every stage that it reaches, so that a node
that hangs has said how far it came. Nodes meet where their ranks will.

What one task of a node leaves unchecked: GPUs beyond the first take no part in the sum, so neither the links
between the GPUs of a node nor a network card that only they use are looked at. Free space is what the file
system says; a quota is not seen. Imports no torch before it is needed.
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
"""It runs; it has looked at itself; it reached the meeting place; it is through."""
TOKEN = "token"
_GIB = 1 << 30
_SUM_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Spec:
    """What to look at."""

    token: str
    """Content of the file TOKEN beside the folder `answers`."""
    answers: str
    """Folder of the answers, on a file system that all nodes share: <node>.json."""
    gpus: int
    """How many a node must show; 0: GPUs are not looked at."""
    min_free_gpu_gib: float
    min_free_disk_gib: dict[str, float]
    """By path. What is low on the file system of `answers` is no node's fault."""
    max_clock_skew_s: float
    """Distance of a node's clock from the median of all."""
    all_reduce: bool
    """False: nodes do not meet; neither clocks nor the network are looked at."""
    timeout_s: int
    """The process ends after this time, wherever it hangs."""


def check(spec: Spec, node: str, facts: launch.RankFacts, clock: Callable[[], float] = time.time) -> None:
    """Write the answer of `node`: the stage reached, "problems" of its own, "shared" ones (of what all nodes
    share), "error" (what kept it from going on, perhaps by another's fault), "clock_skew_s", "all_reduce_s"
    and "seconds" taken. Raises OSError if it cannot be written."""
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
    for path, wanted in spec.min_free_disk_gib.items():
        if low := _low_disk(path, wanted):
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
    if spec.all_reduce:
        try:
            answer["clock_skew_s"], answer["all_reduce_s"] = _together(
                spec, facts, not (problems or shared), lambda: reached("met"), clock
            )
        except (RuntimeError, ValueError) as error:
            message = one_line(f"{type(error).__name__}: {error}")
            if kind_of_error(error) == "lost_peer" and not _is_in_use(error):
                answer["error"] = message
            else:
                problems.append(f"cannot work with the other nodes: {message}")
            reached(answer["stage"])
            return
        skew = answer["clock_skew_s"]
        if abs(skew) > spec.max_clock_skew_s:
            where = "ahead of" if skew > 0 else "behind"
            limit = f"{spec.max_clock_skew_s:.1f} allowed ([preflight] max_clock_skew_s)"
            problems.append(f"its clock is {abs(skew):.1f} s {where} the others', {limit}")
    reached("done")


def _token(spec: Spec) -> list[str]:
    folder = Path(spec.answers).parent
    with suppress(OSError):
        if (folder / TOKEN).read_text() == spec.token:
            return []
    return [f"does not see {folder} as the first node does: the run directory is not on a shared file system"]


def _low_disk(path: str, wanted_gib: float) -> str | None:
    wanted = f"{wanted_gib:g} GiB wanted ([preflight] of the profile)"
    try:
        free = shutil.disk_usage(path).free / _GIB
    except OSError as error:
        return f"{path}: {error.strerror}; {wanted}"
    return None if free >= wanted_gib else f"{free:.1f} GiB free under {path}, {wanted}"


def _is_same_disk(path: str, other: str) -> bool:
    return os.path.exists(path) and os.stat(path).st_dev == os.stat(other).st_dev


def _gpus(spec: Spec) -> list[str]:
    if not spec.gpus:
        return []
    import torch

    visible = torch.cuda.device_count()
    problems = [f"{visible} GPUs visible, {spec.gpus} wanted"] if visible < spec.gpus else []
    for index in range(visible):
        try:
            free = torch.cuda.mem_get_info(index)[0] / _GIB
            torch.ones(1 << 20, device=f"cuda:{index}").sum().cpu()  # a GPU that is broken does not get here
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
    """(distance of this clock from the median of all, seconds of a sum over nodes).

    A node that is not `fine` comes here too, so that the others need not wait for it, but there is no sum."""
    from parallel import world

    # Ends of waiting are the watchdog's, at the same time on all nodes.
    timeout = timedelta(seconds=2 * spec.timeout_s)
    store = world.open_store(facts, timeout, wait=False)
    met()

    def of_all(name: str) -> list[str]:
        return [f"{name}/{rank}" for rank in range(facts.world_size)]

    def gathered(name: str, value: str) -> list[str]:
        store.set(f"{name}/{facts.rank}", value)
        store.wait(of_all(name))
        return [found.decode() for found in store.multi_get(of_all(name))]

    all_fine = gathered("fine", str(fine)).count("True") == facts.world_size
    now = clock()  # all nodes got here together
    skew = now - statistics.median(map(float, gathered("clock", repr(now))))
    seconds = _all_reduce(facts, timeout, store) if all_fine else None
    with suppress(RuntimeError):
        gathered("through", "")
        store.set(f"left/{facts.rank}", "")
        if facts.rank == 0:  # it holds the store: it goes last
            store.wait(of_all("left"))
    return skew, seconds


def _all_reduce(facts: launch.RankFacts, timeout: timedelta, store: Any) -> float:
    """Seconds of one sum over the nodes, by the library that ranks use."""
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
    if (found := (lowest.cpu().item(), highest.cpu().item())) != (right, right):
        raise ValueError(f"a sum over the nodes gave {found[0]:g} to {found[1]:g}, {right:g} is right")
    return time.monotonic() - began


def _is_in_use(error: BaseException) -> bool:
    return "EADDRINUSE" in str(error)


def _read(path: Path, patience_s: float = 30.0) -> Spec:
    """A file system over the network may show a new file late."""
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
        # In C, so that it also ends an import that hangs; tells where. This alone exits with 1.
        faulthandler.dump_traceback_later(spec.timeout_s, exit=True)
        check(spec, name, launch.rank_facts())
    except OSError as error:
        reason = "the run directory is not on a shared file system, or cannot be written here"
        print(f"{name}: does not see {Path(sys.argv[1]).parent}: {reason}: {error}", file=sys.stderr)
    sys.stderr.flush()
    os._exit(0)  # without waiting for connections to peers that may be gone
