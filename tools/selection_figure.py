"""Which image tokens run in which layer, drawn over the images (as p-MoD, arXiv 2412.04449, Figure 5)."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from data_pipeline.image import PatchTokenizer
from data_pipeline.tokenizer import Tokenizer
from data_pipeline.toml_config import ConfigError
from pretrain.figures import ARM_COLOURS, INK, MUTED, PAPER, STYLE
from tools.selected_tokens import IMAGE, DepthRow, Inspection, SeenImage

LAYERS_DRAWN = 12
"""At most; of more, evenly spaced ones."""
_CELL_INCHES = 1.12
_DIMMED = 0.3
"""What is left of a skipped patch: so much of its grey, on light grey."""
_OUTLINE = ARM_COLOURS[1]


@dataclass(frozen=True)
class Picture:
    """A whole image, decoded from its tokens."""

    name: str
    pixels: UInt8[np.ndarray, "height width 3"]
    runs: Mapping[int, Bool[np.ndarray, "rows columns"]]
    """Layer -> which of its patches ran."""


def image_tokenizer(data: Path, fingerprint: str) -> PatchTokenizer:
    """The one that made the tokens in `data`. Raises ConfigError if it is not beside them."""
    for folder in (data / "tokenizers" / IMAGE, data.parent / "tokenizers" / IMAGE):
        if folder.is_dir():
            tokenizer: Tokenizer = PatchTokenizer.load(folder)
            if tokenizer.fingerprint != fingerprint:
                raise ConfigError(f"{folder} is {tokenizer.fingerprint}, {data} was made by {fingerprint}")
            return tokenizer
    raise ConfigError(f"no tokenizer of images beside {data}: images cannot be decoded")


def pictures_of(images: Sequence[SeenImage], tokenizer: PatchTokenizer, count: int) -> list[Picture]:
    """The first whole image of each of the first `count` documents that have one."""
    side = tokenizer.config.size_px // tokenizer.config.patch_px
    found: dict[str, Picture] = {}
    for image in images:
        if len(found) < count and image.name not in found and len(image.codes) == side * side:
            runs = {layer: each.reshape(side, side) for layer, each in image.runs.items()}
            found[image.name] = Picture(image.name, tokenizer.decode(image.codes), runs)
    return list(found.values())


def selection_png(inspection: Inspection, pictures: Sequence[Picture]) -> bytes:
    """A row for each picture: itself, then in each routed layer with the patches that skip it dimmed. Above
    them realised and scheduled ratios of all layers and modalities."""
    layers = sorted(pictures[0].runs) if pictures else []
    drawn = layers
    if len(layers) > LAYERS_DRAWN:
        drawn = [layers[i] for i in np.linspace(0, len(layers) - 1, LAYERS_DRAWN).round().astype(int)]
    columns = 1 + len(drawn)
    width = max(7.0, _CELL_INCHES * columns + 0.3)
    top, row = 2.6, _CELL_INCHES + 0.2
    height = top + (row * len(pictures) + 0.15 if pictures else 0.0)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), facecolor=PAPER)
        config = inspection.config
        figure.text(
            0.1 / width, 1 - 0.12 / height, f"{config.name}, step {inspection.step}: which tokens run",
            fontsize=11.5, fontweight="bold", va="top",
        )  # fmt: skip
        facts = f"{inspection.tokens:,} held-out tokens, chosen by {inspection.by}"
        facts += "; above an image: its own share" if pictures else ""
        figure.text(0.1 / width, 1 - 0.37 / height, facts, fontsize=8.5, va="top", color=MUTED)
        box = (0.55 / width, 1 - (top - 0.55) / height, 1 - 1.5 / width, (top - 1.25) / height)
        draw_ratios(figure.add_axes(box), inspection.depth, config.model.num_layers)
        for index, picture in enumerate(pictures):
            for column, layer in enumerate([None, *drawn]):
                left = 0.1 + column * _CELL_INCHES
                bottom = height - top - 0.2 - row * index - _CELL_INCHES
                size = _CELL_INCHES - 0.1
                ax = figure.add_axes((left / width, bottom / height, size / width, size / height))
                if layer is None:
                    draw_picture(ax, picture.pixels, None, title=picture.name.rpartition("/")[2])
                else:
                    runs = picture.runs[layer]
                    draw_picture(ax, picture.pixels, runs, title=f"layer {layer}: {runs.mean():.2f}")
        buffer = io.BytesIO()
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=180, metadata={"Software": None})
    return buffer.getvalue()


def draw_ratios(ax: Axes, rows: Sequence[DepthRow], num_layers: int) -> None:
    """Realised ratio of each routed layer (points) and the scheduled one (line); dense layers have 1."""
    ends: list[tuple[float, str, str]] = []
    for index, modality in enumerate(dict.fromkeys(row.modality for row in rows)):
        mine = {row.layer: row for row in rows if row.modality == modality}
        shade = ARM_COLOURS[index % len(ARM_COLOURS)]
        scheduled = [mine[i].scheduled if i in mine else 1.0 for i in range(num_layers)]
        ax.step(range(num_layers), scheduled, where="mid", color=shade, linewidth=1.2, alpha=0.55)
        ax.plot(list(mine), [row.realised for row in mine.values()], "o", color=shade, markersize=4.5)
        ends.append((scheduled[-1], modality, shade))
    lowest = 0.0
    for end, modality, shade in sorted(ends):
        y = max(end, lowest)
        lowest = y + 0.14  # a line of text
        ax.annotate(
            modality, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), va="center",
            textcoords="offset points", color=shade, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
    ax.set_ylim(0, 1.05)
    ax.set_xlim(-0.5, num_layers - 0.5)
    ax.set_xlabel("layer (points: share that ran; line: scheduled, 1 where a layer is dense)")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_picture(
    ax: Axes,
    pixels: UInt8[np.ndarray, "height width 3"],
    runs: Bool[np.ndarray, "rows columns"] | None,
    *,
    title: str,
) -> None:
    """The picture, what skips dimmed and what runs outlined. None: as it is."""
    height, width = pixels.shape[:2]
    if runs is not None:
        of_pixel = runs.repeat(height // runs.shape[0], axis=0).repeat(width // runs.shape[1], axis=1)
        grey = pixels.mean(axis=2, keepdims=True)
        dimmed = np.broadcast_to(235 * (1 - _DIMMED) + grey * _DIMMED, pixels.shape).astype(np.uint8)
        pixels = np.where(of_pixel[..., None], pixels, dimmed)
        ax.add_collection(
            LineCollection(_borders(runs, height // runs.shape[0]), colors=_OUTLINE, linewidths=0.9)
        )
    ax.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
    ax.set_title(title, fontsize=7.5, color=INK, pad=3)
    ax.set_xticks([])
    ax.set_yticks([])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set_visible(False)


def _borders(runs: Bool[np.ndarray, "rows columns"], patch_px: int) -> list[list[tuple[int, int]]]:
    """Edges between a patch that runs and one that does not, or the outside: [(x, y), (x, y)] in pixels."""
    framed = np.pad(runs, 1).astype(np.int8)
    p = patch_px
    lines = [
        [(int(x) * p, int(y) * p), (int(x + 1) * p, int(y) * p)]
        for y, x in np.argwhere(np.diff(framed, axis=0)[:, 1:-1])
    ]
    return lines + [
        [(int(x) * p, int(y) * p), (int(x) * p, int(y + 1) * p)]
        for y, x in np.argwhere(np.diff(framed, axis=1)[1:-1])
    ]
