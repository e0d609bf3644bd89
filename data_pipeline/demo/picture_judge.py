"""A judge of pictures of the demo corpus: which digits a picture shows, in reading order.

The judge is a scikit-learn classifier of windows. It is trained on scenes that are drawn from the scans of
training pictures alone, and knows no caption. Its own errors are measured on the scans of held-out pictures.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from data_pipeline.demo.facts import Match, match_digits
from data_pipeline.demo.scenes import (
    GRID_PX,
    PAPERS,
    PICTURE_PX,
    SCAN_PX,
    SIZE_NAMES,
    Scene,
    draw_scene,
    render,
    split_scans,
)

Picture = UInt8[np.ndarray, "height width 3"]

MARGIN_CELLS = 2
"""Cells around a digit that the classifier sees too. A cell is an eighth of the digit's side."""
CELLS = SCAN_PX + 2 * MARGIN_CELLS
NO_DIGIT = 10
"""Class of a window that no digit fills."""
TRAINING_SCENES, HELDOUT_SCENES = 3000, 300
WINDOWS_WITHOUT_DIGIT = 8
"""Windows of a training scene that are shown to the classifier beside those of its digits."""
MOST_DIGITS = 4


class Window(NamedTuple):
    """A square of a picture that a digit may fill."""

    size_px: int
    left_px: int
    top_px: int

    def overlaps(self, other: "Window") -> bool:
        """Whether two windows of one size share pixels."""
        return max(abs(self.left_px - other.left_px), abs(self.top_px - other.top_px)) < self.size_px


@cache
def all_windows() -> tuple[Window, ...]:
    """All windows, by size, then from the top, then from the left."""
    return tuple(
        Window(size, left, top)
        for size in SIZE_NAMES
        for top in range(0, PICTURE_PX - size + 1, GRID_PX)
        for left in range(0, PICTURE_PX - size + 1, GRID_PX)
    )


def ink_of(picture: Picture) -> Float[np.ndarray, "height width"]:
    """Give the distance of every pixel from the paper, 0 to 1. The paper is nearest to the median colour."""
    pixels = picture.astype(np.float32)
    papers = np.array(list(PAPERS.values()), np.float32)
    middle = np.median(pixels.reshape(-1, 3), axis=0)
    paper = papers[np.abs(papers - middle).sum(axis=1).argmin()]
    return np.abs(pixels - paper).max(axis=2) / 255


def window_features(ink: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "windows cells"]:
    """The ink of all windows and of their margins in cells, over the most ink of a cell of the window."""
    found = []
    for size in SIZE_NAMES:
        margin = size * MARGIN_CELLS // SCAN_PX
        seen = np.lib.stride_tricks.sliding_window_view(np.pad(ink, margin), (size + 2 * margin,) * 2)
        mean = _cell_means(size + 2 * margin)
        found.append((mean @ seen[::GRID_PX, ::GRID_PX] @ mean.T).reshape(-1, CELLS * CELLS))
    cells = np.concatenate(found)
    return cells / np.maximum(cells.max(axis=1, keepdims=True), 0.2)


@cache
def _cell_means(pixels: int) -> Float[np.ndarray, "cells pixels"]:
    """The matrix that takes a line of pixels to the means of equally long cells, cut through pixels."""
    edges = np.arange(CELLS + 1) * pixels / CELLS
    first, last = np.arange(pixels), np.arange(1, pixels + 1)
    overlap = np.minimum(edges[1:, None], last) - np.maximum(edges[:-1, None], first)
    return (np.maximum(overlap, 0) * CELLS / pixels).astype(np.float32)


@dataclass(frozen=True)
class PictureJudge:
    """A trained judge; made by `train_picture_judge`."""

    classifier: Any
    """Of scikit-learn: features of a window -> a digit, or NO_DIGIT."""

    def digits(self, picture: Picture) -> tuple[int, ...]:
        """The digits of a picture in reading order, none where it shows none.

        Digits of a picture have one size and do not overlap. Of every size the windows are taken that look
        most like a digit; the size whose windows hold the most ink and look most like digits wins.
        """
        ink = ink_of(picture)
        shares = self.classifier.predict_proba(window_features(ink))
        logs = np.log(np.maximum(shares, 1e-9))
        likeness, best = logs[:, :NO_DIGIT].max(axis=1) - logs[:, NO_DIGIT], logs[:, :NO_DIGIT].argmax(axis=1)
        found = [self._of_size(size, likeness, ink) for size in SIZE_NAMES]
        _, chosen = max(found, key=lambda each: each[0])
        order = sorted(chosen, key=lambda index: _reading_key(chosen, index))
        return tuple(int(best[index]) for index in order)

    def features(self, picture: Picture) -> Float[np.ndarray, " features"]:
        """What the hidden layer of the classifier makes of a picture: the mean over its windows. It tells
        shapes, sizes and places of ink, and no colour but that of the paper."""
        weights, bias = self.classifier.coefs_[0], self.classifier.intercepts_[0]
        return np.maximum(window_features(ink_of(picture)) @ weights + bias, 0).mean(axis=0)

    def _of_size(
        self, size: int, likeness: Float[np.ndarray, " windows"], ink: Float[np.ndarray, "height width"]
    ) -> tuple[float, list[int]]:
        """(how well the windows of a size explain a picture, their numbers)."""
        windows = all_windows()
        own = [i for i, window in enumerate(windows) if window.size_px == size and likeness[i] > 0]
        chosen: list[int] = []
        for i in sorted(own, key=lambda i: -likeness[i]):
            if len(chosen) < MOST_DIGITS and not any(windows[i].overlaps(windows[j]) for j in chosen):
                chosen.append(i)
        held = sum(
            float(ink[w.top_px : w.top_px + size, w.left_px : w.left_px + size].sum())
            for w in (windows[i] for i in chosen)
        )
        return held / max(float(ink.sum()), 1e-9), chosen


def _reading_key(chosen: Sequence[int], index: int) -> tuple[int, int]:
    """Rows and diagonals are read from the left, columns and squares from the top."""
    windows = all_windows()
    lefts = [windows[i].left_px for i in chosen]
    left, top = windows[index].left_px, windows[index].top_px
    return (left, top) if len(set(lefts)) == len(lefts) else (top, left)


def train_picture_judge(seen: Callable[[Picture], Picture], seed: int = 0) -> PictureJudge:
    """A judge that is trained on scenes of the training scans. `seen`: a picture as a model's pictures show
    it, through the tokenizer of the model. The same arguments give the same judge on one processor."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from threadpoolctl import threadpool_limits

    features, labels = [], []
    for scene, picture in _scenes(TRAINING_SCENES, seed, seen, heldout=False):
        cells, truth = window_features(ink_of(picture)), _labels(scene)
        digits = np.flatnonzero(truth != NO_DIGIT)
        others = np.flatnonzero((truth == NO_DIGIT) & (cells.max(axis=1) > 0))
        random = np.random.default_rng([seed, len(labels)])
        chosen = random.choice(others, min(len(others), WINDOWS_WITHOUT_DIGIT), replace=False)
        rows = np.concatenate([digits, chosen])
        features.append(cells[rows])
        labels.append(truth[rows])
    # scikit-learn's stubs say that batch_size is a text.
    classifier = MLPClassifier((96,), batch_size=200, learning_rate_init=2e-3, max_iter=15, random_state=seed)  # pyright: ignore[reportArgumentType]
    with threadpool_limits(1), warnings.catch_warnings():  # sums over threads come in any order
        warnings.simplefilter("ignore", ConvergenceWarning)  # the number of passes is chosen
        classifier.fit(np.concatenate(features), np.concatenate(labels))
    return PictureJudge(classifier)


def judge_pictures(judge: PictureJudge, seen: Callable[[Picture], Picture], seed: int = 0) -> list[Match]:
    """Match what the judge reads in pictures of held-out scans, none of which it was trained on."""
    return [
        match_digits(judge.digits(picture), (digit.value for digit in scene.digits))
        for scene, picture in _scenes(HELDOUT_SCENES, seed, seen, heldout=True)
    ]


def heldout_features(
    judge: PictureJudge, seen: Callable[[Picture], Picture], seed: int = 0
) -> Float[np.ndarray, "pictures features"]:
    """The features of pictures of held-out scans."""
    return np.array(
        [judge.features(picture) for _, picture in _scenes(HELDOUT_SCENES, seed, seen, heldout=True)]
    )


def _scenes(
    count: int, seed: int, seen: Callable[[Picture], Picture], *, heldout: bool
) -> Iterator[tuple[Scene, Picture]]:
    scans = split_scans(heldout=heldout)
    for number in range(count):
        scene = draw_scene(Random(f"judge/{seed}/{heldout}/{number}"), scans)
        yield scene, seen(render(scene))


def _labels(scene: Scene) -> Int[np.ndarray, " windows"]:
    """The class of every window of a scene."""
    values = {Window(d.size_px, d.left_px, d.top_px): d.value for d in scene.digits}
    return np.array([values.get(window, NO_DIGIT) for window in all_windows()])
