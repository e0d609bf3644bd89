"""The picture of `motley inspect`: the ratios of all layers, and the tokens that run drawn on images."""

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pretrain.comparison.report.figures import ARM_COLOURS, MUTED, PAPER, STYLE
from pretrain.evaluation.selection_picture import sheet
from tools.selected_tokens import DepthRow, Inspection

_DPI = 136
"""Dots per inch of the figure and of the sheet of images."""


def selection_png(inspection: Inspection) -> bytes:
    """The picture as PNG: the ratios of all layers and modalities, above the images, if there are any."""
    config, top = inspection.config, 2.4
    pixels = None
    if inspection.images is not None:
        pixels = sheet(inspection.images.texts, inspection.ran, inspection.images.source)
    rows, columns = (0, 0) if pixels is None else pixels.shape[:2]
    width, height = max(7.0, columns / _DPI + 0.2), top + rows / _DPI
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=PAPER)
        figure.text(
            0.1 / width, 1 - 0.12 / height, f"{config.name}, step {inspection.step}: which tokens run",
            fontsize=11.5, fontweight="bold", va="top",
        )  # fmt: skip
        facts = f"{inspection.tokens:,} held-out tokens, chosen by {inspection.by}"
        facts += "" if pixels is None else "; above an image: its own share"
        figure.text(0.1 / width, 1 - 0.37 / height, facts, fontsize=8.5, va="top", color=MUTED)
        box = (0.55 / width, 1 - (top - 0.55) / height, 1 - 1.5 / width, (top - 1.25) / height)
        draw_ratios(figure.add_axes(box), inspection.depth, config.model.num_layers)
        if pixels is not None:
            figure.figimage(pixels, xo=_DPI // 10, yo=0, origin="upper")
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def draw_ratios(ax: Axes, rows: Sequence[DepthRow], num_layers: int) -> None:
    """Draw realised ratios of routed layers as points and scheduled ratios (1 if dense) as lines."""
    ends: list[tuple[float, str, str]] = []
    for index, modality in enumerate(dict.fromkeys(row.modality for row in rows)):
        by_layer = {row.layer: row for row in rows if row.modality == modality}
        shade = ARM_COLOURS[index % len(ARM_COLOURS)]
        scheduled = [by_layer[i].scheduled if i in by_layer else 1.0 for i in range(num_layers)]
        ax.step(range(num_layers), scheduled, where="mid", color=shade, linewidth=1.2, alpha=0.55)
        ax.plot(list(by_layer), [row.realised for row in by_layer.values()], "o", color=shade, markersize=4.5)
        ends.append((scheduled[-1], modality, shade))
    lowest = 0.0
    for end, modality, shade in sorted(ends):
        y = max(end, lowest)
        lowest = y + 0.14  # the height of a line of text
        ax.annotate(
            modality, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), va="center",
            textcoords="offset points", color=shade, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set_ylim(0, 1.05)
    ax.set_xlim(-0.5, num_layers - 0.5)
    ax.set_xlabel("layer (points: share that ran; line: scheduled, 1 where a layer is dense)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
