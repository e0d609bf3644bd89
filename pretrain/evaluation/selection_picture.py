"""A picture of the image tokens that run in every layer, drawn over the images.

It is made as p-MoD's Figure 5 (arXiv 2412.04449), with Pillow alone, so that training needs no matplotlib.
"""

from collections.abc import Mapping, Sequence
from math import isqrt
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from data_pipeline.shards.index import TokenSource
from data_pipeline.tokenize.registry import open_tokenizer
from data_pipeline.tokenize.tokenizer import Tokenizer
from pretrain.evaluation.documents import Text

IMAGE = "image"
"""The modality whose tokens are drawn."""
LAYERS_DRAWN = 12
"""Largest number of layers drawn; if there are more, evenly spaced ones are."""
CELL_PX, LABEL_PX, GAP_PX = 128, 18, 8
"""Side of an image, height of the line of text above it, and space between images."""
_SLATE, _GREY = np.array([110, 130, 165]), 235
"""Tokens that skip are mixed with slate, which is neither black nor white; unknown pixels are grey."""


def image_tokenizer(source: TokenSource) -> Tokenizer | str:
    """The tokenizer that made the images of `source`, or a text that says why there is none.

    It is searched in the folder `tokenizers` inside the data's folder and beside it.
    """
    data, made_by = source.folder, source.fingerprints[IMAGE]
    if not isinstance(data, Path):
        return f"{data} is no folder of this machine, so no tokenizer of images lies beside it"
    for folder in (data / "tokenizers" / IMAGE, data.parent / "tokenizers" / IMAGE):
        if folder.is_dir():
            try:
                tokenizer = open_tokenizer(folder, IMAGE)
            except (OSError, ValueError) as error:
                return f"{folder}: {error}"
            fits = tokenizer.fingerprint == made_by
            return tokenizer if fits else f"{folder} is {tokenizer.fingerprint}, {data} was made by {made_by}"
    return f"no tokenizer of images beside {data}"


def sheet(
    texts: Sequence[Text], ran: Mapping[int, Bool[np.ndarray, "texts tokens"]], source: TokenSource
) -> UInt8[np.ndarray, "height width 3"]:
    """The picture: a row per text with its first image, then this image in every layer of `ran`.

    Tokens that skip are faded, and the share that runs stands above. Without a tokenizer the images are plain
    grids, and a line says why.
    """
    layers = [sorted(ran)[round(i)] for i in np.linspace(0, len(ran) - 1, min(len(ran), LAYERS_DRAWN))]
    width, height = CELL_PX + GAP_PX, LABEL_PX + CELL_PX + GAP_PX
    page = Image.new("RGB", (width * (1 + len(layers)), height * len(texts) + LABEL_PX), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(LABEL_PX - 5)
    tokenizer = image_tokenizer(source)
    if isinstance(tokenizer, str):
        draw.text((0, page.height - LABEL_PX), f"images are not decoded: {tokenizer}", "black", font)
    for row, text in enumerate(texts):
        is_image = source.vocabulary.modality_of(text.ids) == source.vocabulary.modalities.index(IMAGE)
        start = int(is_image.argmax())
        ids = text.ids[start : start + int((~is_image[start:]).argmax())]
        codes = ids - source.vocabulary.first_code(IMAGE)
        for column, layer in enumerate((None, *layers)):
            runs = None if layer is None else ran[layer][row, start : start + len(codes)]
            label = text.name.rpartition("/")[2] if runs is None else f"layer {layer}: {runs.mean():.2f}"
            draw.text((column * width, row * height), label, "black", font)
            page.paste(_panel(codes, runs, tokenizer), (column * width, row * height + LABEL_PX))
    return np.asarray(page)


def _panel(
    codes: Int[np.ndarray, " n"], runs: Bool[np.ndarray, " n"] | None, tokenizer: Tokenizer | str
) -> Image.Image:
    """One image; if its number of tokens is not a square, a grid that is nearest to a square."""
    rows = max(n for n in range(1, isqrt(len(codes)) + 1) if len(codes) % n == 0)
    if isinstance(tokenizer, str) or rows * rows != len(codes):
        pixels = np.full((rows, len(codes) // rows, 3), _GREY, np.uint8)
    else:
        pixels = tokenizer.decode(codes)
    if runs is not None:
        px = len(pixels) // rows
        of_pixel = runs.reshape(rows, -1).repeat(px, axis=0).repeat(px, axis=1)[..., None]
        faded = 0.25 * pixels.mean(axis=2, keepdims=True) + 0.75 * _SLATE
        pixels = np.where(of_pixel, pixels, faded).astype(np.uint8)
    return Image.fromarray(pixels).resize((CELL_PX, CELL_PX), Image.Resampling.BOX)
