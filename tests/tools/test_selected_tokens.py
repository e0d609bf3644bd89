import json
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.batch import make_batch
from data_pipeline.toml_config import ConfigError
from data_pipeline.vocabulary import BOI, BOS, EOI, EOS
from pretrain.checkpoint_folder import STATE
from pretrain.metrics import read_rows
from pretrain.run_dir import CHECKPOINTS
from pretrain.weight_sources import open_source
from tests.pretrain.tiny_data import VOCABULARY
from tests.tools.conftest import write_run
from tools.selected_tokens import images_in, inspect

FIRST = VOCABULARY.start("image")


def test_images_are_found_where_they_are_with_what_ran_of_them() -> None:
    one = np.array([BOS, BOI, FIRST + 3, FIRST + 4, EOI, 9, BOI, FIRST + 5, EOI, EOS])
    two = np.array([BOS, 8, BOI, FIRST, FIRST + 1])  # a piece that ends within its image
    batch = make_batch(
        [[one], [two, one]],
        sequence_tokens=16,
        vocabulary=VOCABULARY,
        samples=[["a"], ["b", "c"]],
    )
    flat = np.arange(32) % 3 == 0
    found = images_in(batch, VOCABULARY, {5: flat})
    assert [(image.name, image.codes.tolist()) for image in found] == [
        ("a", [3, 4]), ("a", [5]), ("b", [0]), ("c", [3, 4]), ("c", [5]),
    ]  # fmt: skip
    places = [[2, 3], [7], [19], [22, 23], [27]]
    assert [image.runs[5].tolist() for image in found] == [flat[each].tolist() for each in places]


def test_tokens_that_ran_are_those_that_a_reference_lets_through(depth_run: Path) -> None:
    """In layer 0 a score is that of the token's embedding alone."""
    found = inspect(depth_run)
    source = open_source(found.checkpoint)
    state = json.loads((found.checkpoint / STATE).read_text())["state"]
    threshold = state["thresholds"]["blocks.0.depth.image"]
    (name,) = [n for n in source.tensors if n.startswith("blocks.0.depth.image")]
    weight = source.tensors[name].read()
    (name,) = [n for n in source.tensors if n.startswith("embedding")]
    table = source.tensors[name].read()
    seen = [0, 0]
    for image in found.images:
        for code, ran in zip(image.codes.tolist(), image.runs[0].tolist(), strict=True):
            x = table[FIRST + code].double()
            rms = (x.square().mean() + found.config.model.norm_eps).sqrt()
            score = float((x * weight).sum() / rms / len(x))
            assert ran == (score >= threshold)
            seen[ran] += 1
    assert min(seen) > 10

    rows = {(row.layer, row.modality): row for row in found.depth}
    assert list(rows) == [(layer, modality) for layer in (0, 1) for modality in ("image", "speech")]
    for layer in (0, 1):
        of_images = np.concatenate([image.runs[layer] for image in found.images])
        assert rows[layer, "image"].realised == pytest.approx(of_images.mean(), abs=1e-12)
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
