"""A run that is saved and loaded goes on bit for bit, at every stage."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from parallel.layout import ParallelConfig
from parallel.testing import run_on_ranks
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.test_zero_equals_one_process import STEPS, Stage, engine_of
from tests.numerics.toy import Toy, toy_step

SAVED_AT = 2
Outcome = tuple[list[StepResult], dict[str, torch.Tensor]]


def _steps(folder: Path, stage: Stage, precision: Literal["fp32", "bf16"], resume: bool) -> Outcome:
    """Steps after SAVED_AT, and the parameters at the end, in fp32: without a break, or after a load."""
    w = world.start(ParallelConfig())
    module = Toy()
    engine = engine_of(module, w, stage, precision=precision)
    if resume:
        found = restore(folder, engine, w)
        assert found is not None and found.step == SAVED_AT
    results = []
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        for step in range(SAVED_AT if resume else 0, STEPS):
            if step == SAVED_AT and not resume:
                writer.save(step, None)
            results.append(engine.train_step(toy_step(step, dp_size=w.dp_size)[w.dp_rank], step))
    parameters = {name: _whole(parameter) for name, parameter in module.named_parameters()}
    return results[-(STEPS - SAVED_AT) :], parameters


def _whole(parameter: torch.nn.Parameter) -> torch.Tensor:
    from deepspeed.utils import safe_get_full_fp32_param

    master = safe_get_full_fp32_param(parameter)  # None at stage 0, which partitions nothing
    return (parameter if master is None else master).detach().clone()


@pytest.mark.parametrize(
    ("stage", "precision"),
    [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")],
)
def test_a_loaded_run_goes_on_bit_for_bit(
    tmp_path: Path, stage: Stage, precision: Literal["fp32", "bf16"]
) -> None:
    unbroken = run_on_ranks(_steps, 2, tmp_path, stage, precision, False)
    resumed = run_on_ranks(_steps, 2, tmp_path, stage, precision, True)
    for (expected, weights), (got, loaded) in zip(unbroken, resumed, strict=True):
        assert len(expected) == len(got) == STEPS - SAVED_AT
        assert got == expected
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert torch.equal(loaded[name], weight), name
