"""Other optimizers than AdamW, each written as one OptimizerSpec, train, are saved and go on bit for bit."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from parallel import world
from parallel.engine import StepResult
from parallel.optimizer import OptimizerSpec
from pretrain.checkpoint.folder import CheckpointError
from pretrain.checkpoint.restore import restore
from pretrain.checkpoint.save import CheckpointWriter
from tests.numerics.plain_loop import assert_same, plain_steps
from tests.numerics.test_zero_equals_one_process import STEPS, Stage, engine_of
from tests.numerics.toy import Toy, toy_groups, toy_step
from tests.one_world import run_cases

SAVED_AT = 2


def _sgd(groups: Sequence[Mapping[str, Any]], _world: Any = None) -> torch.optim.Optimizer:
    return torch.optim.SGD([dict(group) for group in groups], lr=0.0, momentum=0.9, nesterov=True)


def _rmsprop(groups: Sequence[Mapping[str, Any]], _world: Any = None) -> torch.optim.Optimizer:
    return torch.optim.RMSprop([dict(group) for group in groups], lr=0.0, alpha=0.9)


SPECS = {
    "sgd": OptimizerSpec(
        "sgd", ("momentum_buffer",), (), _sgd, lambda p, _: {"momentum_buffer": torch.zeros_like(p)}
    ),
    "rmsprop": OptimizerSpec(
        "rmsprop",
        ("square_avg",),
        ("step",),
        _rmsprop,
        lambda p, _: {"step": torch.zeros(()), "square_avg": torch.zeros_like(p)},
    ),
}
"""One state and no counter; one state and a counter, which RMSprop keeps on the host."""


Outcome = tuple[list[StepResult], dict[str, torch.Tensor], dict[str, float] | None]


def _steps(
    w: world.World, folder: Path, name: str, stage: Stage, precision: Literal["fp32", "bf16"], resume: bool
) -> Outcome:
    """Results of the steps, of which a resumed run makes those after SAVED_AT; this rank's values of
    fragments and the counters at the end."""
    engine = engine_of(Toy(), w, stage, precision=precision, optimizer=SPECS[name])
    if resume:
        found = restore(folder, engine, w)
        assert found is not None and found.step == SAVED_AT
    results = []
    with CheckpointWriter(folder, engine, w, keep=1) as writer:
        for step in range(SAVED_AT if resume else 0, STEPS):
            if step == SAVED_AT and not resume:
                writer.save(step, None)
            results.append(engine.train_step(toy_step(step, dp_size=w.dp_size)[w.dp_rank], step))
    values = {
        f"{fragment.name}/{kind}/{fragment.start}": value.clone()
        for fragment in engine.fragments()
        for kind, value in fragment.values.items()
    }
    return results, values, engine.counters()


ENGINES = [
    ("sgd", 0, "fp32"),
    ("sgd", 1, "fp32"),
    ("sgd", 3, "fp32"),
    ("rmsprop", 0, "fp32"),
    ("rmsprop", 1, "bf16"),
    ("rmsprop", 3, "fp32"),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Path, list[Outcome], list[Outcome]]]:
    """Of each engine: where it was saved, and of every rank what it does without a break and after a load."""
    folders = [tmp_path_factory.mktemp("saved") for _ in ENGINES]
    unbroken, resumed = (
        run_cases(
            _steps, 2, [(folder, *engine, resume) for folder, engine in zip(folders, ENGINES, strict=True)]
        )
        for resume in (False, True)
    )
    return list(zip(folders, unbroken, resumed, strict=True))


@pytest.mark.parametrize(("name", "stage", "precision"), ENGINES)
def test_it_trains_as_in_one_process_and_a_loaded_run_goes_on_bit_for_bit(
    outcomes: list[tuple[Path, list[Outcome], list[Outcome]]], name: str, stage: int, precision: str
) -> None:
    folder, unbroken, resumed = outcomes[ENGINES.index((name, stage, precision))]
    (path,) = folder.glob("step_*")
    manifest = json.loads((path / "manifest.json").read_text())
    counters = {"step": float(SAVED_AT)} if name == "rmsprop" else {}
    assert manifest["optimizer"] == {"name": name, "counters": counters}
    for entry in manifest["tensors"].values():
        assert entry["digest"].keys() == {"parameter", *SPECS[name].states}
    if precision == "fp32":
        module = Toy()
        batches = lambda step: toy_step(step, dp_size=1)[0]  # noqa: E731
        expected = plain_steps(module, toy_groups(module), batches, STEPS, build=SPECS[name].build)
        # Sums in another order: as of AdamW, tests/numerics/test_zero_equals_one_process.py.
        assert_same(unbroken[0][0], expected, rtol=1e-5)
    for (steps, values, counters), (got, loaded, loaded_counters) in zip(unbroken, resumed, strict=True):
        assert got == steps[SAVED_AT:] and loaded_counters == counters
        assert loaded.keys() == values.keys()
        assert all(torch.equal(loaded[key], value) for key, value in values.items())


def _restore_with(w: world.World, folder: Path, name: str) -> str:
    try:
        restore(folder, engine_of(Toy(), w, 1, optimizer=SPECS[name]), w)
    except CheckpointError as error:
        return str(error)
    return "restored"


def test_the_states_of_another_optimizer_are_refused(
    outcomes: list[tuple[Path, list[Outcome], list[Outcome]]],
) -> None:
    folder, _, _ = outcomes[ENGINES.index(("sgd", 1, "fp32"))]
    ((message,),) = run_cases(_restore_with, 1, [(folder, "rmsprop")])
    assert "it holds the states of optimizer sgd, and this run has rmsprop; go on with sgd, or" in message
