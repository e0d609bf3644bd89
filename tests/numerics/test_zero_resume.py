"""A run that is saved and loaded goes on bit for bit, at every stage."""

from pathlib import Path
from typing import Literal

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.test_zero_equals_one_process import STEPS, Stage, engine_of
from tests.numerics.toy import Toy, toy_step
from tests.one_world import run_cases

SAVED_AT = 2
Outcome = tuple[list[StepResult], dict[str, torch.Tensor]]


def _steps(
    w: world.World, folder: Path, stage: Stage, precision: Literal["fp32", "bf16"], resume: bool
) -> Outcome:
    """Steps after SAVED_AT, and the parameters at the end, in fp32: without a break, or after a load."""
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


ENGINES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Outcome]]]:
    """Of the run without a break and of that after a load: of each engine, the outcome of every rank."""
    folder = tmp_path_factory.mktemp("saved")
    found = []
    for resume in (False, True):
        cases = [(folder / f"{stage} {precision}", stage, precision, resume) for stage, precision in ENGINES]
        found.append(run_cases(_steps, 2, cases))
    return found


@pytest.mark.parametrize(("stage", "precision"), ENGINES)
def test_a_loaded_run_goes_on_bit_for_bit(
    outcomes: list[list[list[Outcome]]], stage: Stage, precision: str
) -> None:
    unbroken, resumed = (of_engines[ENGINES.index((stage, precision))] for of_engines in outcomes)
    for (expected, weights), (got, loaded) in zip(unbroken, resumed, strict=True):
        assert len(expected) == len(got) == STEPS - SAVED_AT
        assert got == expected
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert torch.equal(loaded[name], weight), name
