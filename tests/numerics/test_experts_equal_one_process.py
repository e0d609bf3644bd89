"""Decoders with experts on layouts of ranks: the one process, step for step, and resumed on another."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import world
from parallel.layout import ParallelConfig
from parallel.logical import logical_of
from parallel.testing import run_on_ranks
from parallel.zero_engine import ZeroEngine
from pretrain.models import feed_forward
from pretrain.models.decoder import Decoder
from pretrain.models.pretraining import Pretraining
from tests.numerics import layouts
from tests.numerics.layouts import Towers, assert_all_equal_one_process, assert_equals_one_process, train
from tests.numerics.plain_loop import assert_same, plain_steps
from tests.numerics.test_resume_other_layout import _go_on, _save
from tests.one_world import run_cases

WHOLE_STREAM = {"sequence_parallel": False}


@pytest.mark.parametrize(
    ("ranks", "layout", "towers"),
    [
        (2, {"tp": 2, "zero_stage": 0}, ("moe", "experts", "auxiliary")),
        (2, {"tp": 2, "zero_stage": 0, **WHOLE_STREAM, "activation_checkpointing": True}, ("moe", "experts")),
        (2, {"pp": 2, "zero_stage": 0, "activation_checkpointing": True}, ("moe", "auxiliary")),
        pytest.param(4, {"pp": 4, "zero_stage": 0}, ("auxiliary",), marks=pytest.mark.full),
        (4, {"tp": 2, "pp": 2, "zero_stage": 0}, ("experts",)),
        pytest.param(
            4, {"tp": 2, "pp": 2, "zero_stage": 0, **WHOLE_STREAM}, ("auxiliary",), marks=pytest.mark.full
        ),
        pytest.param(4, {"tp": 2, "zero_stage": 3}, ("experts",), marks=pytest.mark.full),
        (4, {"pp": 2}, ("auxiliary",)),
    ],
    ids=lambda value: str(value).replace("'", ""),
)
def test_ranks_equal_one_process(ranks: int, layout: dict[str, Any], towers: tuple[Towers, ...]) -> None:
    """In fp64, but for those with ZeRO."""
    assert_equals_one_process(ranks, layout, towers)


def test_data_parallel_ranks_equal_one_process() -> None:
    assert_all_equal_one_process(
        2,
        [
            ({"zero_stage": 0}, ("auxiliary",)),
            ({"zero_stage": 1}, ("experts",)),
            ({"zero_stage": 3, "activation_checkpointing": True}, ("moe", "auxiliary")),
        ],
    )


def _parameters(layout: ParallelConfig) -> tuple[int, dict[str, torch.Tensor]]:
    """Tensor-parallel rank, and what it holds after STEPS."""
    w = world.start(layout)
    engine, batches_of = _decoder(w, layout, "auxiliary")
    for step in range(layouts.STEPS):
        engine.train_step(batches_of(step), step)
    return w.tp_rank, {name: p.detach().clone() for name, p in engine.named_parameters.items()}


def test_auxiliary_losses_of_stages_move_the_same_parameters() -> None:
    layout = ParallelConfig(tp=2, pp=2, zero_stage=0)
    config, dtype = layouts.model_config("auxiliary"), layouts.dtype_of(layout)
    module = Pretraining(Decoder(config, seed=5)).to(dtype)
    started = {name: p.detach().clone() for name, p in module.decoder.named_parameters()}
    batches_of = lambda step: layouts.micro_batches(config, step, dtype)  # noqa: E731
    plain_steps(module, layouts.groups_of(module), batches_of, layouts.STEPS, layouts.learning_rate_at)
    trained, seen = dict(module.decoder.named_parameters()), set()
    for tp_rank, held in run_on_ranks(_parameters, 4, layout, timeout_s=180):
        for name, found in held.items():
            whole = trained[name].detach()
            moved = float((whole - started[name]).norm())
            difference = float((found - logical_of(trained[name]).cut(whole, tp_rank, 2)).norm())
            assert difference <= 1e-10 * moved, (name, difference, moved)
            seen.add(name)
    assert seen == started.keys()


def _with(trap: str, layout: ParallelConfig) -> Any:
    """`train` with one sum over tensor-parallel ranks left out."""
    summed = feed_forward.sum_gradient
    wanted = 1 if trap == "gates" else 2
    feed_forward.sum_gradient = lambda x, tp: x if x.ndim == wanted else summed(x, tp)
    return train(layout, ("moe",))


@pytest.mark.parametrize("trap", ["gates", "rows"])
def test_a_sum_that_is_left_out_is_seen(trap: str) -> None:
    layout = ParallelConfig(tp=2, zero_stage=0)
    layouts.assert_is_seen(run_on_ranks(_with, 2, trap, layout)[0]["moe"], layout, "moe")


def _decoder(
    w: world.World, layout: ParallelConfig, towers: Towers = "experts"
) -> tuple[ZeroEngine, Callable[[int], Any]]:
    config = layouts.model_config(towers)
    engine = layouts.engine_of(w, towers, layout, prefix="decoder.")
    dtype = layouts.dtype_of(layout)
    return engine, lambda step: layouts.share(w, layouts.micro_batches(config, step, dtype))


def test_a_run_goes_on_on_another_layout(tmp_path: Path) -> None:
    saves = {"tp2": ParallelConfig(tp=2), "dp2": ParallelConfig(zero_stage=3)}
    expected = {
        name: run_cases(_save, 2, [(_decoder, layout, tmp_path / name)], layout)[0][0]
        for name, layout in saves.items()
    }
    # From both to a third, and from each of the two to the other.
    for target, sources in (
        (ParallelConfig(pp=2), ["tp2", "dp2"]),
        (ParallelConfig(tp=2), ["dp2"]),
        (ParallelConfig(zero_stage=3), ["tp2"]),
    ):
        cases = [(_decoder, target, tmp_path / source) for source in sources]
        for source, ranks in zip(sources, run_cases(_go_on, 2, cases, target), strict=True):
            assert_same(ranks[0], expected[source], layouts.RTOL[torch.float32])
