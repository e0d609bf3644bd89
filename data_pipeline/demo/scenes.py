"""Pictures of the demo corpus: scans of handwritten digits (scikit-learn's, 8 x 8), coloured and laid out."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from random import Random
from typing import Any

import numpy as np
from PIL import Image

PICTURE_PX = 32
SCAN_PX = 8
HELDOUT_EVERY = 5
"""Every fifth scan of a digit is kept for held-out pictures, whatever the seed."""

INKS = {
    "red": (226, 44, 44),
    "orange": (244, 148, 24),
    "green": (40, 168, 72),
    "blue": (52, 104, 236),
    "purple": (158, 60, 196),
    "pink": (250, 132, 180),
}
PAPERS = {"black": (12, 12, 16), "white": (250, 250, 246)}
SMALL, MEDIUM, BIG, HUGE = 8, 12, 16, 24
SIZE_NAMES = {SMALL: "small", MEDIUM: "medium", BIG: "big", HUGE: "huge"}
GRID_PX = 4
"""Digits stand on a grid of this pitch, as type does, so that words can name their position."""

ROW, COLUMN, SQUARE, RISING, FALLING, ALONE = "row", "column", "square", "rising", "falling", "alone"
ROW_PLACES = {0: "top", 8: "upper half", 12: "middle", 16: "lower half", 24: "bottom"}


@dataclass(frozen=True)
class Digit:
    """A scan in a picture: its class, its index among all scans, its ink, and the square that it fills."""

    value: int
    scan: int
    ink: str
    size_px: int
    left_px: int
    top_px: int


@dataclass(frozen=True)
class Scene:
    """A picture before it is drawn: digits on paper, in a layout such as ROW."""

    layout: str
    paper: str
    digits: tuple[Digit, ...]
    """In reading order: a row from the left, a column and a square from the top."""


@lru_cache(maxsize=1)
def digit_scans() -> tuple[np.ndarray, np.ndarray]:
    """(ink uint8 [1797, 8, 8] of 0 .. 255, class [1797]) as scikit-learn ships them."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    return np.round(bunch.images * (255 / 16)).astype(np.uint8), bunch.target


def split_scans(heldout: bool) -> list[list[int]]:
    """Indices of the scans of digits 0 .. 9 for training pictures, or for held-out pictures."""
    _, targets = digit_scans()
    per_digit = [np.flatnonzero(targets == value).tolist() for value in range(10)]
    return [[s for i, s in enumerate(scans) if (i % HELDOUT_EVERY == 0) == heldout] for scans in per_digit]


def draw_scene(random: Random, scans: Sequence[Sequence[int]]) -> Scene:
    """A random scene of 1 to 4 digits; `scans` holds the indices that may be used for digits 0 .. 9."""
    layout = random.choices((ALONE, ROW, COLUMN, RISING, FALLING, SQUARE), weights=(3, 5, 4, 2, 2, 4))[0]
    if layout == ALONE:
        count = 1
    elif layout == SQUARE:
        count = 4
    else:
        count = random.choices((2, 3, 4), weights=(6, 2, 1))[0]
    papers = tuple(PAPERS)
    squares = _squares(random, layout, count)
    inks = random.sample(tuple(INKS), 2) if random.random() < 0.3 else tuple(INKS)
    if random.random() < 0.2:
        inks = (random.choice(tuple(INKS)),)
    digits = []
    for left, top, size in squares:
        value = random.randrange(10)
        digits.append(Digit(value, random.choice(scans[value]), random.choice(inks), size, left, top))
    return Scene(layout, random.choice(papers), tuple(digits))


def _squares(random: Random, layout: str, count: int) -> list[tuple[int, int, int]]:
    """(left, top, size) of digits in reading order; no digit overlaps another."""
    roomy = count <= 2 or layout == SQUARE
    size = random.choices((SMALL, MEDIUM, BIG), weights=(1, 2, 3))[0] if roomy else SMALL
    free = PICTURE_PX - size

    def anywhere(room: int) -> int:
        return random.randrange(0, room + 1, GRID_PX)

    if layout == ALONE:
        size = random.choices(tuple(SIZE_NAMES), weights=(1, 1, 2, 2))[0]
        free = PICTURE_PX - size
        return [(anywhere(free), anywhere(free), size)]
    if layout == SQUARE:
        gap = random.randrange(0, min(PICTURE_PX - 2 * size, 2 * GRID_PX) + 1, GRID_PX)
        room = PICTURE_PX - 2 * size - gap
        left, top, step = anywhere(room), anywhere(room), size + gap
        return [(left + step * column, top + step * row, size) for row in (0, 1) for column in (0, 1)]
    largest_gap = (PICTURE_PX - count * size) // (count - 1)
    gap = random.randrange(0, min(largest_gap, 2 * GRID_PX) + 1, GRID_PX)
    along = anywhere(PICTURE_PX - count * size - (count - 1) * gap)
    steps = [along + i * (size + gap) for i in range(count)]
    if layout == ROW:
        top = anywhere(free)
        return [(step, top, size) for step in steps]
    if layout == COLUMN:
        left = anywhere(free)
        return [(left, step, size) for step in steps]
    downwards = steps if layout == FALLING else steps[::-1]
    return [(step, down, size) for step, down in zip(steps, downwards, strict=True)]


@cache
def _ink_of(scan: int, size_px: int) -> np.ndarray:
    """Ink coverage of a scan, float32 [size, size] of 0 .. 1."""
    picture = Image.fromarray(digit_scans()[0][scan])
    if size_px != SCAN_PX:
        picture = picture.resize((size_px, size_px), Image.Resampling.BICUBIC)
    return np.asarray(picture, np.float32) / 255


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 [PICTURE_PX, PICTURE_PX, 3]."""
    canvas = np.empty((PICTURE_PX, PICTURE_PX, 3), np.float32)
    canvas[:] = PAPERS[scene.paper]
    for digit in scene.digits:
        coverage = _ink_of(digit.scan, digit.size_px)[..., None]
        rows = slice(digit.top_px, digit.top_px + digit.size_px)
        columns = slice(digit.left_px, digit.left_px + digit.size_px)
        ink = np.asarray(INKS[digit.ink], np.float32)
        canvas[rows, columns] = canvas[rows, columns] * (1 - coverage) + ink * coverage
    return np.round(canvas).astype(np.uint8)


def png(picture: np.ndarray) -> bytes:
    """PNG file of a uint8 [H, W, 3] picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()
