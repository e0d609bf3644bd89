from random import Random

import numpy as np
import pytest

from data_pipeline.demo import picture_judge
from data_pipeline.demo.picture_judge import (
    CELLS,
    MARGIN_CELLS,
    Window,
    all_windows,
    heldout_features,
    ink_of,
    judge_pictures,
    train_picture_judge,
    window_features,
)
from data_pipeline.demo.scenes import PAPERS, PICTURE_PX, digit_scans, draw_scene, render, split_scans


def as_drawn(picture: np.ndarray) -> np.ndarray:
    return picture


def test_ink_is_the_distance_from_the_paper() -> None:
    for paper in PAPERS.values():
        picture = np.full((PICTURE_PX, PICTURE_PX, 3), paper, np.uint8)
        assert not ink_of(picture).any()
        picture[3, 4] = (226, 44, 44)
        assert ink_of(picture)[3, 4] > 0.7 and np.count_nonzero(ink_of(picture)) == 1


def test_a_window_shows_the_cells_of_the_scan_that_fills_it() -> None:
    """A scan of 8 px is drawn as it is, so the cells of its window are its pixels."""
    scans = split_scans(heldout=False)
    scene = next(s for s in (draw_scene(Random(n), scans) for n in range(99)) if s.digits[0].size_px == 8)
    digit = scene.digits[0]
    cells = window_features(ink_of(render(scene)))
    row = cells[all_windows().index(Window(8, digit.left_px, digit.top_px))].reshape(CELLS, CELLS)
    inner = row[MARGIN_CELLS:-MARGIN_CELLS, MARGIN_CELLS:-MARGIN_CELLS]
    ink = digit_scans()[0][digit.scan].astype(float)
    # Coverage is rounded to whole colours twice: 0.008 measured.
    np.testing.assert_allclose(inner / inner.max(), ink / ink.max(), atol=0.05)
    assert len(cells) == len(all_windows()) == 119


def test_the_judge_reads_scans_that_it_was_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture_judge, "TRAINING_SCENES", 500)
    monkeypatch.setattr(picture_judge, "HELDOUT_SCENES", 100)
    judge = train_picture_judge(as_drawn)
    matches = judge_pictures(judge, as_drawn)
    # 0.92 of the digits measured, with an eighth of the scenes of a real judge.
    assert sum(match.shared for match in matches) > 0.75 * sum(match.larger for match in matches)
    assert judge.digits(np.full((PICTURE_PX, PICTURE_PX, 3), 250, np.uint8)) == ()

    # Features of scans and of noise lie apart, by more than those of two halves of the scans.
    scans = heldout_features(judge, as_drawn)
    noise = np.random.default_rng(1).integers(0, 256, (20, PICTURE_PX, PICTURE_PX, 3)).astype(np.uint8)
    of_noise = np.mean([judge.features(picture) for picture in noise], axis=0)
    halves = np.linalg.norm(scans[::2].mean(axis=0) - scans[1::2].mean(axis=0))
    assert scans.shape == (100, 96)
    # 43 times measured.
    assert np.linalg.norm(of_noise - scans.mean(axis=0)) > 3 * halves
