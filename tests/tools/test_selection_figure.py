"""The picture is looked at by people; tests hold its curves and that the sheet is in it as it is."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from pretrain.evaluation.selection_picture import sheet
from tools.selected_tokens import DepthRow, inspect
from tools.selection_figure import draw_ratios, selection_png


def test_dense_layers_are_scheduled_whole() -> None:
    ax = Figure().add_subplot()
    draw_ratios(ax, [DepthRow(1, "image", 0.5, 0.4, 1, 0), DepthRow(2, "image", 0.25, 0.3, 1, 0)], 3)
    line, points = ax.lines
    assert np.asarray(line.get_ydata()).tolist() == [1, 0.5, 0.25]
    assert np.asarray(points.get_xdata()).tolist() == [1, 2]


def test_names_of_curves_that_end_alike_stand_apart() -> None:
    ax = Figure().add_subplot()
    draw_ratios(ax, [DepthRow(0, name, 0.3, 0.3, 1, 0) for name in ("image", "speech", "text")], 1)
    heights = sorted(text.xy[1] for text in ax.texts)  # type: ignore[attr-defined]
    assert heights == pytest.approx([0.3, 0.44, 0.58])


def test_the_page_is_the_ratios_above_the_sheet(depth_run: Path) -> None:
    found = inspect(depth_run, documents=3)
    assert found.images is not None
    drawn = np.asarray(Image.open(io.BytesIO(selection_png(found))).convert("RGB"))
    below = sheet(found.images.texts, found.ran, found.images.source)
    rows, columns = below.shape[:2]
    places = [x for x in range(50) if np.array_equal(drawn[-rows:, x : x + columns], below)]
    assert len(places) == 1
    alone = Image.open(io.BytesIO(selection_png(inspect(depth_run))))
    assert abs(len(drawn) - rows - alone.size[1]) <= 1
