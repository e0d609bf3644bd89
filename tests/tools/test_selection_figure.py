"""The picture is looked at by people; tests hold what is dimmed and outlined, and what is left out."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from data_pipeline.toml_config import ConfigError
from tests.tools.conftest import SIDE, image_tokenizer, write_data
from tools.selected_tokens import DepthRow, SeenImage, inspect
from tools.selection_figure import (
    draw_picture,
    draw_ratios,
    pictures_of,
    selection_png,
)
from tools.selection_figure import (
    image_tokenizer as tokenizer_beside,
)


def seen(name: str, count: int) -> SeenImage:
    return SeenImage(name, np.arange(count) % 16, {1: np.arange(count) < 4})


def test_each_document_gives_its_first_whole_image() -> None:
    images = [seen("a", 3), seen("a", 16), seen("b", 7), seen("a", 16), seen("c", 16), seen("d", 16)]
    found = pictures_of(images, image_tokenizer(), 2)
    assert [picture.name for picture in found] == ["a", "c"]
    assert found[0].pixels[::4, ::4, 0].tolist() == (15 * np.arange(16).reshape(SIDE, SIDE)).tolist()
    assert found[0].runs[1].tolist() == [[True] * 4] + [[False] * 4] * 3


def test_what_skips_is_dimmed_and_what_runs_is_outlined() -> None:
    runs = np.array([[True, True], [True, False]])
    pixels = np.full((8, 8, 3), (200, 0, 0), np.uint8)
    ax = Figure().add_subplot()
    draw_picture(ax, pixels, runs, title="t")
    drawn = np.asarray(ax.images[0].get_array())
    assert (drawn[:4] == pixels[:4]).all() and (drawn[4:, :4] == pixels[4:, :4]).all()
    dimmed = drawn[4:, 4:]
    assert (dimmed == dimmed[0, 0, 0]).all() and 150 < dimmed[0, 0, 0] < 250
    segments = {tuple(map(tuple, each.tolist())) for each in ax.collections[0].get_segments()}  # type: ignore[attr-defined]
    corner = {((4.0, 4.0), (8.0, 4.0)), ((4.0, 4.0), (4.0, 8.0))}
    assert corner <= segments and len(segments) == 8  # 6 edges of the outside, 2 towards what skips
    assert ((4.0, 8.0), (8.0, 8.0)) not in segments


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


def test_the_page_grows_with_its_pictures(depth_run: Path) -> None:
    found = inspect(depth_run)
    pictures = pictures_of(found.images, image_tokenizer(), 3)
    assert len(pictures) == 3
    sizes = [Image.open(io.BytesIO(selection_png(found, pictures[:count]))).size for count in (0, 1, 3)]
    assert sizes[0][1] < sizes[1][1] < sizes[2][1] and sizes[0][0] == sizes[2][0]


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer of images"):
        tokenizer_beside(tmp_path, "x")
    write_data(tmp_path)
    assert tokenizer_beside(tmp_path / "heldout", image_tokenizer().fingerprint).size == 16
    with pytest.raises(ConfigError, match="was made by x"):
        tokenizer_beside(tmp_path / "heldout", "x")
