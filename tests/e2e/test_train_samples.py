"""Training with samples is training: the same rows, on one rank and on several, and a page per interval.
Another run has images that are vectors.
"""

from pathlib import Path

import pytest

from pretrain.metrics import read_rows
from tests.e2e.test_train_resume import curve
from tests.e2e.warm import train
from tests.pretrain.tiny_data import tiny_run
from tests.pretrain.tiny_tokenizers import write_demo_like_data
from tests.toml_text import toml_text
from tools.cli import main


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    values = tiny_run(folder / "data", folder / "runs")
    values["model"]["vocab_tokens"] = write_demo_like_data(folder / "data").size
    values["total_tokens"] = 12 * values["tokens_per_step"]
    (folder / "tiny.toml").write_text(toml_text(values))
    return folder / "tiny.toml"


@pytest.mark.parametrize(("processes", "zero_stage"), [(1, 0), (2, 2)])
def test_samples_change_no_number(run_file: Path, tmp_path: Path, processes: int, zero_stage: int) -> None:
    runs = run_file.parent / "runs"
    for name, more in (("off", ()), ("on", ("every_steps.samples=5",))):
        name = f"{name}_{zero_stage}"
        arguments = [str(run_file), f"name={name}", f"parallel.zero_stage={zero_stage}", *more]
        train(arguments, tmp_path / "out", processes=processes)
    on, off = (runs / f"{name}_{zero_stage}" for name in ("on", "off"))
    assert curve(on) == curve(off) and len(read_rows(on / "metrics.jsonl")) == 5
    pages = sorted(path.name for path in (on / "samples").iterdir())
    assert pages == ["step_00000005.html", "step_00000010.html", "step_00000012.html"]
    assert not (off / "samples").exists()


def test_a_run_over_vectors_draws_while_it_trains_and_afterwards(
    tmp_path: Path,
) -> None:
    values = tiny_run(tmp_path / "data", tmp_path / "runs")
    values["model"]["vocab_tokens"] = write_demo_like_data(tmp_path / "data", vectors=True).size
    values["model"]["vectors"] = {"image": {"features": 48, "objective": "flow"}}
    values["total_tokens"] = 5 * values["tokens_per_step"]
    (tmp_path / "tiny.toml").write_text(toml_text(values))
    train([str(tmp_path / "tiny.toml"), "every_steps.samples=5"], tmp_path / "out")
    run = tmp_path / "runs" / "tiny"
    page = (run / "samples" / "step_00000005.html").read_text()
    # Two prompts of every modality: an image in front of text, and one as truth and one as sample behind it.
    assert page.count("data:image/png;base64,") == 2 + 2 * 2
    out = tmp_path / "drawn"
    words = ["generate", run, "--heldout", "2", "--to", "image", "--image-steps", "3", "--out", out]
    assert main([str(word) for word in words]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names == ["000_00.txt", "000_00_0.png", "001_00.txt", "001_00_0.png", "index.html"]
