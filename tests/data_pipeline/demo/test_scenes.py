import io
from random import Random

import numpy as np
import pytest
from PIL import Image

from data_pipeline.demo.scenes import (
    COLUMN,
    FALLING,
    INKS,
    PAPERS,
    PICTURE_PX,
    RISING,
    ROW,
    SIZE_NAMES,
    SQUARE,
    digit_scans,
    draw_scene,
    png,
    render,
    split_scans,
)

SCANS = split_scans(heldout=False)
SCENES = [draw_scene(Random(seed), SCANS) for seed in range(400)]


def test_training_and_heldout_scans_are_disjoint_and_all() -> None:
    pixels, targets = digit_scans()
    train, heldout = split_scans(False), split_scans(True)
    for value in range(10):
        assert not set(train[value]) & set(heldout[value])
        assert sorted(train[value] + heldout[value]) == np.flatnonzero(targets == value).tolist()
        assert len(heldout[value]) > 30
    assert pixels.shape == (1797, 8, 8) and pixels.max() == 255
    used = {(digit.value, digit.scan) for scene in SCENES for digit in scene.digits}
    assert all(scan in train[value] for value, scan in used)


def test_digits_are_inside_the_picture_and_apart() -> None:
    for scene in SCENES:
        covered = np.zeros((PICTURE_PX, PICTURE_PX), int)
        for digit in scene.digits:
            assert min(digit.left_px, digit.top_px) >= 0
            assert max(digit.left_px, digit.top_px) + digit.size_px <= PICTURE_PX
            rows, columns = (slice(at, at + digit.size_px) for at in (digit.top_px, digit.left_px))
            covered[rows, columns] += 1
        assert covered.max() == 1


def test_layouts_are_what_their_names_say_in_reading_order() -> None:
    for scene in SCENES:
        left, top = ([getattr(digit, name) for digit in scene.digits] for name in ("left_px", "top_px"))
        if scene.layout == ROW:
            assert left == sorted(set(left)) and len(set(top)) == 1
        elif scene.layout == COLUMN:
            assert top == sorted(set(top)) and len(set(left)) == 1
        elif scene.layout in (RISING, FALLING):
            assert left == sorted(set(left))
            assert top == sorted(set(top), reverse=scene.layout == RISING)
        elif scene.layout == SQUARE:
            assert list(zip(top, left, strict=True)) == sorted(zip(top, left, strict=True))


def test_everything_that_varies_does() -> None:
    digits = [digit for scene in SCENES for digit in scene.digits]
    assert {digit.value for digit in digits} == set(range(10))
    assert {digit.ink for digit in digits} == set(INKS)
    assert {digit.size_px for digit in digits} == set(SIZE_NAMES)
    assert {scene.paper for scene in SCENES} == set(PAPERS)
    assert {len(scene.digits) for scene in SCENES} == {1, 2, 3, 4}
    assert len({scene.layout for scene in SCENES}) == 6


@pytest.mark.parametrize("seed", range(5))
def test_ink_is_where_the_digits_are(seed: int) -> None:
    scene = SCENES[seed]
    pixels = render(scene)
    assert pixels.shape == (PICTURE_PX, PICTURE_PX, 3) and pixels.dtype == np.uint8
    blank = (pixels == PAPERS[scene.paper]).all(-1)
    for digit in scene.digits:
        rows, columns = (slice(at, at + digit.size_px) for at in (digit.top_px, digit.left_px))
        assert not blank[rows, columns].all()
        blank[rows, columns] = True
        nearest = np.abs(pixels[rows, columns].astype(int) - INKS[digit.ink]).sum(-1).min()
        assert nearest < 30, "somewhere it is all ink"
    assert blank.all()
    assert (np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all()
