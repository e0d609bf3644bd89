"""A run saved on one layout goes on with the same numbers on every other: weights, moments, all is there.

In fp32, because checkpoints hold fp32 and DeepSpeed keeps the weights of ZeRO 1-3 in it (see layouts.py)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel import world
from parallel.engine import MicroBatch, StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from parallel.weight_average import with_average
from parallel.zero_engine import ZeroEngine
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics import layouts
from tests.numerics.plain_loop import OPTIMIZER, assert_same, deviation
from tests.numerics.test_zero_equals_one_process import engine_of
from tests.numerics.toy import Toy, toy_groups, toy_step

SAVED_AT, STEPS = 1, 3
Layout = tuple[int, dict[str, Any]]
"""Ranks, and what differs from the standard ParallelConfig."""
Maker = Callable[[world.World, ParallelConfig], tuple[ZeroEngine, Callable[[int], Sequence[MicroBatch]]]]
"""What makes an engine and this rank's batches of a step."""

DECODER: dict[str, Layout] = {
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "dp2 ZeRO-3": (2, {"zero_stage": 3}),
    "tp2 x dp2 ZeRO-3": (4, {"tp": 2, "zero_stage": 3}),
}
TOY: dict[str, Layout] = {
    "1 ZeRO-1": (1, {"zero_stage": 1}),
    "dp2 ZeRO-0": (2, {"zero_stage": 0}),
    "dp2 ZeRO-1": (2, {"zero_stage": 1}),
    "dp2 ZeRO-2": (2, {"zero_stage": 2}),
    "dp2 ZeRO-3": (2, {"zero_stage": 3}),
    "dp4 ZeRO-3": (4, {"zero_stage": 3}),
}
TOY_RTOL = 2e-6
"""Sums in another order make 1.2e-7, as without a resume, in fp32 and in bf16, whose masters are fp32."""
TOY_BF16 = [name for name in TOY if name != "dp2 ZeRO-0"]


def _decoder(w: world.World, layout: ParallelConfig) -> Any:
    """Three towers in everything but two kinds of norms, LayerNorm, biases, dropout, and an average of
    weights, whose digest in memory a load verifies."""
    config = layouts.model_config("untied_elements")
    optimizer = with_average(OPTIMIZER, 0.9)
    engine = layouts.engine_of(w, "untied_elements", layout, prefix="decoder.", optimizer=optimizer)
    return engine, lambda step: layouts.share(w, layouts.micro_batches(config, step))


def _tied(w: world.World, layout: ParallelConfig) -> Any:
    """The head has the embedding's weights."""
    config = layouts.model_config("tied_embeddings")
    engine = layouts.engine_of(w, "tied_embeddings", layout, prefix="decoder.")
    return engine, lambda step: layouts.share(w, layouts.micro_batches(config, step))


def _decoder_bf16(w: world.World, layout: ParallelConfig) -> Any:
    config = layouts.model_config("dense")
    engine = layouts.engine_of(w, "dense", layout, prefix="decoder.", precision="bf16")
    return engine, lambda step: layouts.share(w, layouts.micro_batches(config, step))


def _toy(w: world.World, layout: ParallelConfig) -> Any:
    engine = engine_of(Toy(), w, layout.zero_stage, optimizer=with_average(OPTIMIZER, 0.9))
    return engine, lambda step: toy_step(step, dp_size=w.dp_size)[w.dp_rank]


def _toy_bf16(w: world.World, layout: ParallelConfig) -> Any:
    """With a frozen tower, which no optimizer keeps."""
    module = Toy()
    groups = toy_groups(module, frozen="image")
    engine = engine_of(module, w, layout.zero_stage, precision="bf16", groups=groups)
    return engine, lambda step: toy_step(step, dp_size=w.dp_size)[w.dp_rank]


def _save(make: Maker, layout: ParallelConfig, folder: Path) -> list[StepResult]:
    """A run that is not disturbed, and saved on the way: its results after that."""
    w = world.start(layout)
    engine, batches = make(w, layout)
    results = []
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        for step in range(STEPS):
            if step == SAVED_AT:
                writer.save(step, None)
            results.append(engine.train_step(batches(step), step))
    return results[SAVED_AT:]


def _go_on(
    make: Maker, layout: ParallelConfig, folders: Sequence[Path], moments: float = 1.0
) -> list[list[StepResult]]:
    """From each folder's checkpoint. `moments`: what they are multiplied by, for a negative control."""
    w = world.start(layout)
    found = []
    for folder in folders:
        engine, batches = make(w, layout)
        restored = restore(folder, engine, w)
        assert restored is not None and restored.step == SAVED_AT
        assert engine.counters() == {"step": float(SAVED_AT)}
        for fragment in engine.fragments():
            for kind in fragment.values.keys() - {"parameter"}:
                fragment.values[kind].mul_(moments)
        found.append([engine.train_step(batches(step), step) for step in range(SAVED_AT, STEPS)])
    return found


def _layout(make: Maker, name: str) -> Layout:
    return (DECODER if make in (_decoder, _tied, _decoder_bf16) else TOY)[name]


def _run(fn: Any, make: Maker, layout: Layout, *args: Any) -> Any:
    ranks, options = layout
    results = run_on_ranks(fn, ranks, make, ParallelConfig(**options), *args, timeout_s=180)
    assert all(result == results[0] for result in results)
    return results[0]


Saved = Callable[[Maker, str], tuple[Path, list[StepResult]]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """(engine, layout) -> the checkpoints' folder and the results of the run that wrote it; trained once."""
    runs: dict[tuple[Maker, str], tuple[Path, list[StepResult]]] = {}

    def of(make: Maker, name: str) -> tuple[Path, list[StepResult]]:
        if (make, name) not in runs:
            folder = tmp_path_factory.mktemp("saved")
            layout = _layout(make, name)
            runs[make, name] = folder, _run(_save, make, layout, folder)
        return runs[make, name]

    return of


def _check(saved: Saved, make: Maker, target: str, sources: Sequence[str], rtol: float) -> None:
    runs = [saved(make, source) for source in sources]
    found = _run(_go_on, make, _layout(make, target), [folder for folder, _ in runs])
    for source, (_, expected), results in zip(sources, runs, found, strict=True):
        if source == target:
            assert results == expected
        assert_same(results, expected, rtol)


def _ring(names: Sequence[str]) -> list[tuple[str, list[str]]]:
    """(target, sources): each layout goes on from the one before it, and the first from itself too. What is
    in memory after a load is verified to be what was saved, so a target does not care which source it was."""
    return [
        (name, [names[0], names[-1]] if number == 0 else [names[number - 1]])
        for number, name in enumerate(names)
    ]


@pytest.mark.parametrize(("target", "sources"), _ring(list(DECODER)))
def test_the_decoder_goes_on_on_every_layout(saved: Saved, target: str, sources: list[str]) -> None:
    _check(saved, _decoder, target, sources, layouts.RTOL[torch.float32])


def test_one_weight_of_embedding_and_head_goes_on(saved: Saved) -> None:
    _check(saved, _tied, "dp2 ZeRO-3", ["tp2"], layouts.RTOL[torch.float32])


@pytest.mark.parametrize(("target", "sources"), _ring(list(TOY)))
def test_every_stage_goes_on_from_others(saved: Saved, target: str, sources: list[str]) -> None:
    _check(saved, _toy, target, sources, TOY_RTOL)


@pytest.mark.parametrize(("target", "sources"), _ring(TOY_BF16))
def test_bf16_goes_on_from_its_fp32_masters(saved: Saved, target: str, sources: list[str]) -> None:
    # With masters that were rounded to bf16 on the way: 3e-3.
    _check(saved, _toy_bf16, target, sources, TOY_RTOL)


def test_bf16_stages_go_on_under_zero(saved: Saved) -> None:
    # Another tp rounds other partial sums to bf16: 2e-3, which would hide what is looked for.
    _check(saved, _decoder_bf16, "dp2 ZeRO-3", ["pp2"], TOY_RTOL)


@pytest.mark.parametrize("moments", [0.0, 1.5])
def test_without_the_right_moments_it_would_be_seen(saved: Saved, moments: float) -> None:
    folder, expected = saved(_toy, "dp2 ZeRO-1")
    (results,) = _run(_go_on, _toy, TOY["dp2 ZeRO-3"], [folder], moments)
    assert deviation(results, expected) > 100 * TOY_RTOL
    folder, expected = saved(_decoder, "dp2 ZeRO-3")
    (results,) = _run(_go_on, _decoder, DECODER["pp2"], [folder], moments)
    assert deviation(results, expected) > 100 * layouts.RTOL[torch.float32]
