"""Several cases on ranks that meet once, because a meeting takes longer than most cases do."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

from parallel import world
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks


def run_cases(
    fn: Callable[..., Any],
    world_size: int,
    cases: Sequence[tuple[Any, ...]],
    layout: ParallelConfig | None = None,
) -> list[list[Any]]:
    """For each case, what `fn(world, *case)` returned on every rank, in rank order.

    The cases run one after the other in the same processes. `layout`: that of the ranks; an engine may differ
    in its ZeRO stage. A case that fails fails them all (parallel/testing.py).
    """
    ranks = run_on_ranks(_on_rank, world_size, layout or ParallelConfig(), fn, list(cases), timeout_s=180)
    return [list(of_case) for of_case in zip(*ranks, strict=True)]


def _on_rank(layout: ParallelConfig, fn: Callable[..., Any], cases: Sequence[tuple[Any, ...]]) -> list[Any]:
    w, results = world.start(layout), []
    for case in cases:
        results.append(fn(w, *case))
        gc.collect()  # the finalizer of an engine imports; CPython 3.11.2 breaks an import that it interrupts
    return results
