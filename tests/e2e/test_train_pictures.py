"""Pictures of what runs, read from event files: what an evaluation chose, once a step, on any layout."""

import io
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.evaluation.selection_picture import sheet
from pretrain.run_files import CHECKPOINTS
from tests.e2e.test_train_resume import last_step
from tests.e2e.warm import Run, train
from tests.pretrain.evaluation.test_selection_picture import faded_patches
from tests.pretrain.tiny_data import VOCABULARY
from tests.tools.conftest import DEPTH, SIDE, write_data, write_run
from tools.selected_tokens import inspect

SHORT = ("total_tokens=3072", "every_steps.eval=6", "every_steps.log=1")
"""12 steps, of which 6 and 12 are drawn."""


def run_file(folder: Path, **depth: object) -> str:
    folder.mkdir()
    write_data(folder / "data")
    return str(write_run(folder, depth={"image": DEPTH | depth}))


def pictures(folder: Path, tag: str = "eval/image_tokens") -> dict[int, np.ndarray]:
    """Step -> pixels, of all event files together."""
    events = EventAccumulator(str(folder / "runs" / "tiny" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    found = [(event.step, Image.open(io.BytesIO(event.encoded_image_string))) for event in events.Images(tag)]
    assert len({step for step, _ in found}) == len(found), "a step is drawn twice"
    return {step: np.asarray(picture) for step, picture in found}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    train([run_file(folder), *SHORT], folder / "out")
    return folder


def test_the_patches_that_are_faded_skip_at_that_step(undisturbed: Path) -> None:
    drawn = pictures(undisturbed)
    assert list(drawn) == [6, 12]
    seen = []
    for checkpoint in sorted((undisturbed / "runs" / "tiny" / CHECKPOINTS).iterdir()):
        step = int(checkpoint.name.removeprefix("step_"))
        if step not in drawn:
            continue
        found = inspect(checkpoint, documents=4)
        assert found.images is not None and list(found.ran) == [0, 1]
        assert np.array_equal(drawn[step], sheet(found.images.texts, found.ran, found.images.source))
        for row, text in enumerate(found.images.texts):
            (places,) = np.nonzero(VOCABULARY.modality_of(text.ids) == VOCABULARY.modalities.index("image"))
            if len(places) == SIDE * SIDE:
                for layer in (0, 1):
                    skips = ~found.ran[layer][row, places].reshape(SIDE, SIDE)
                    assert (faded_patches(drawn[step], row, 1 + layer) == skips).all()
                    seen.append(skips.mean())
    assert len(seen) >= 2 and 0 < np.mean(seen) < 1


def test_a_killed_run_draws_every_step_once(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "killed"
    run = Run([run_file(folder), *SHORT], folder / "out")
    run.wait_until(lambda: last_step(folder / "runs" / "tiny") >= 7)  # drawn at 6; the checkpoint is of 5
    run.signal(signal.SIGKILL)
    run.codes()
    train([str(folder / "tiny.toml"), *SHORT], folder / "out")
    again, expected = pictures(folder), pictures(undisturbed)
    assert list(again) == list(expected)
    assert all(np.array_equal(again[step], expected[step]) for step in expected)


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.micro_batch_sequences=1"])
def test_layouts_draw_the_same(undisturbed: Path, tmp_path: Path, layout: str) -> None:
    """Two ranks: tensor-parallel (with sequence parallel), stages of a layer each, data-parallel."""
    folder = tmp_path / "two"
    train([run_file(folder), *SHORT, layout], folder / "out", processes=2)
    two, expected = pictures(folder), pictures(undisturbed)
    assert list(two) == list(expected)
    # Rounding may turn a choice; it turned none of them when this was written.
    assert all(np.mean(two[step] != expected[step]) < 0.02 for step in expected)


def test_a_picture_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from pretrain.train.meter import Meter

    meter = object.__new__(Meter)
    meter._log = object()  # type: ignore[assignment]
    meter.picture(7, "eval/image_tokens", None, {})  # type: ignore[arg-type]
    (line,) = capfd.readouterr().out.splitlines()
    assert line.startswith("step 7: eval/image_tokens is not drawn: AttributeError: ")


def test_a_rule_that_looks_ahead_is_drawn_causally_too(tmp_path: Path) -> None:
    folder = tmp_path / "top_k"
    train([run_file(folder, rule="top_k"), *SHORT], folder / "out")
    ahead, causal = pictures(folder), pictures(folder, "eval/causal/image_tokens")
    assert list(ahead) == list(causal) and not np.array_equal(ahead[12], causal[12])
