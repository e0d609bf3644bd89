import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from pretrain.checkpoint.folder import STATE
from pretrain.metrics import read_rows
from pretrain.run_files import CHECKPOINTS
from pretrain.weights.sources import open_source
from tests.pretrain.tiny_data import VOCABULARY
from tests.tools.conftest import write_run
from tools.selected_tokens import inspect


def test_tokens_that_ran_are_those_that_a_reference_lets_through(depth_run: Path) -> None:
    """In layer 0 a score is that of the token's embedding alone."""
    found = inspect(depth_run, documents=1000)
    assert found.images is not None and list(found.ran) == [0, 1]
    source = open_source(found.checkpoint)
    state = json.loads((found.checkpoint / STATE).read_text())["state"]
    threshold = state["thresholds"]["blocks.0.depth.image"]
    (name,) = [n for n in source.tensors if n.startswith("blocks.0.depth.image")]
    weight = source.tensors[name].read()
    (name,) = [n for n in source.tensors if n.startswith("embedding")]
    table = source.tensors[name].read()
    seen = [0, 0]
    of_images: list[list[bool]] = [[], []]
    for row, text in enumerate(found.images.texts):
        for place in np.flatnonzero(VOCABULARY.modality_of(text.ids) == VOCABULARY.modalities.index("image")):
            of_images[1].append(found.ran[1][row, place])
            of_images[0].append(ran := found.ran[0][row, place])
            x = table[int(text.ids[place])].double()
            rms = (x.square().mean() + found.config.model.norm_eps).sqrt()
            score = float((x * weight).sum() / rms / len(x))
            assert ran == (score >= threshold)
            seen[int(ran)] += 1
    assert min(seen) > 10

    rows = {(row.layer, row.modality): row for row in found.depth}
    assert list(rows) == [(layer, modality) for layer in (0, 1) for modality in ("image", "speech")]
    for layer in (0, 1):
        assert rows[layer, "image"].realised == pytest.approx(np.mean(of_images[layer]), abs=1e-12)
        assert rows[layer, "image"].scheduled == 0.5 and rows[layer, "speech"].scheduled == 0.75
        assert 0.5 < rows[layer, "speech"].realised <= 0.75  # the rest of a division is dropped
        assert abs(rows[layer, "image"].gate_mean - 1) < 0.2 and 0 < rows[layer, "image"].gate_std < 0.2


def test_the_causal_form_chooses_by_thresholds(depth_run: Path) -> None:
    trained, causal = inspect(depth_run), inspect(depth_run, causal=True)
    ratios = [
        [row.realised for row in found.depth if row.modality == "speech"] for found in (trained, causal)
    ]
    assert ratios[0] != ratios[1]
    assert "look at later" in trained.by and "thresholds" in causal.by


def test_a_directory_and_a_checkpoint_are_the_same_run(depth_run: Path) -> None:
    run = depth_run.parent / "runs" / "tiny"
    by_file, by_folder = inspect(depth_run), inspect(run)
    (*_, last) = sorted((run / CHECKPOINTS).iterdir())
    assert by_file.depth == by_folder.depth == inspect(last).depth
    assert by_folder.step == read_rows(run / "metrics.jsonl")[-1]["step"]


def test_what_cannot_be_looked_at_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no run directory"):
        inspect(tmp_path)
    with pytest.raises(ConfigError, match="train the run first"):
        inspect(write_run(tmp_path))


def test_a_step_that_is_not_there_and_data_that_is_gone_are_named(depth_run: Path, tmp_path: Path) -> None:
    run = depth_run.parent / "runs" / "tiny"
    with pytest.raises(ConfigError, match=r"step_00000007 is not there; checkpoints of .*step_00000024"):
        inspect(run / CHECKPOINTS / "step_00000007")
    values = json.loads((run / "config.resolved.json").read_text())
    values["data"]["heldout"] = str(tmp_path / "gone")
    (tmp_path / "config.resolved.json").write_text(json.dumps(values))
    (tmp_path / CHECKPOINTS).symlink_to(run / CHECKPOINTS)
    with pytest.raises(ConfigError, match=r"data\.heldout cannot be read: .*gone"):
        inspect(tmp_path)
