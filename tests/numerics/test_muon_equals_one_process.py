"""Muon on every layout that it takes: the one process, step for step, and resumed on others."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import muon_steps, world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.layouts import (
    STEPS,
    assert_is_seen,
    dtype_of,
    engine_of,
    micro_batches,
    model_config,
    one_process,
    share,
    train_on,
    train_together,
)  # fmt: skip
from tests.numerics.plain_loop import assert_same

RTOL = {torch.float64: 1e-10, torch.float32: 4e-4}
"""fp32: 3.8e-5 measured, in the norm of a tower. A last bit of a gradient may turn a bit of the bf16 in
which Newton-Schulz works, and the update of a whole matrix then differs by about 1 %; losses differ by 2e-7.
That equal gradients give equal updates on every layout is held bit for bit in
tests/parallel/test_muon_steps.py."""
SAVED_AT = 2


@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        (2, [{"zero_stage": 0}, {"zero_stage": 1}, {"zero_stage": 2}]),
        pytest.param(4, [{"zero_stage": 1}], marks=pytest.mark.full),
        (2, [{"zero_stage": 0, "tp": 2}]),
        (2, [{"zero_stage": 0, "tp": 2, "sequence_parallel": False}]),
        (4, [{"zero_stage": 1, "tp": 2}]),
        (2, [{"zero_stage": 1, "pp": 2}]),
    ],
    ids=str,
)
def test_ranks_equal_one_process(ranks: int, layouts: list[dict[str, Any]]) -> None:
    together = train_together(ranks, [(layout, ("muon",)) for layout in layouts])
    for layout, results in zip(layouts, together, strict=True):
        dtype = dtype_of(ParallelConfig(**layout))
        assert_same(results["muon"], one_process("muon", dtype), RTOL[dtype])


def test_in_bf16() -> None:
    """DeepSpeed has another optimizer for it, with partitions of its own."""
    (results,) = train_on(2, {"zero_stage": 1}, ("muon",), "bf16").values()
    for bf16, fp32 in zip(results, one_process("muon", torch.float32), strict=True):
        assert sum(bf16.stats[:3]) == pytest.approx(sum(fp32.stats[:3]), rel=1e-2)


def _parts_by_themselves(_engine: ZeroEngine) -> None:
    """Each tensor-parallel rank orthogonalises its part of a matrix alone."""
    orthogonal = muon_steps.MuonWithAdamW._step_group

    def step_group(self: muon_steps.MuonWithAdamW, group: dict[str, Any]) -> None:
        with pytest.MonkeyPatch.context() as patch:
            gathered = lambda parts, own, group: [part.copy_(own) for part in parts]  # noqa: E731
            patch.setattr(muon_steps.dist, "all_gather", gathered)
            orthogonal(self, group)

    muon_steps.MuonWithAdamW._step_group = step_group  # type: ignore[method-assign]


def test_a_matrix_in_parts_is_seen() -> None:
    layout = {"zero_stage": 0, "tp": 2}
    (results,) = train_on(2, layout, ("muon",), "fp32", _parts_by_themselves).values()
    assert_is_seen(results, ParallelConfig(**layout), "muon")


def _train(engine: ZeroEngine, w: world.World, layout: ParallelConfig, steps: range) -> list[StepResult]:
    config, dtype = model_config("muon"), dtype_of(layout)
    return [engine.train_step(share(w, micro_batches(config, step, dtype)), step) for step in steps]


def _resume(folder: Path, layout: ParallelConfig, *, save: bool) -> list[StepResult]:
    w = world.start(layout)
    engine = engine_of(w, "muon", layout)
    if not save:
        found = restore(folder, engine, w)
        assert found is not None and found.step == SAVED_AT
        return _train(engine, w, layout, range(SAVED_AT, STEPS))
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        results = _train(engine, w, layout, range(SAVED_AT))
        writer.save(SAVED_AT, None)
        return results + _train(engine, w, layout, range(SAVED_AT, STEPS))


def _save(folder: Path, layout: ParallelConfig) -> list[StepResult]:
    return _resume(folder, layout, save=True)


def _go_on(folder: Path, layout: ParallelConfig) -> list[StepResult]:
    return _resume(folder, layout, save=False)


def test_a_run_goes_on_bit_for_bit_and_on_other_layouts(tmp_path: Path) -> None:
    saved_on = ParallelConfig(zero_stage=1)
    unbroken = run_on_ranks(_save, 2, tmp_path, saved_on)[0]
    assert run_on_ranks(_go_on, 2, tmp_path, saved_on)[0] == unbroken[SAVED_AT:]
    for ranks, layout in (
        (2, ParallelConfig(zero_stage=1, tp=2)), (2, ParallelConfig(zero_stage=1, pp=2)), (1, saved_on),
    ):  # fmt: skip
        assert_same(
            run_on_ranks(_go_on, ranks, tmp_path, layout)[0], unbroken[SAVED_AT:], RTOL[torch.float32]
        )
