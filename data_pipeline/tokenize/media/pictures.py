"""Pictures of raw documents: decoding and resizing files, and how close decoded tokens come to a picture."""

import io
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin

from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import Medium, Tokenizer

Fit = Literal["crop", "pad", "stretch"]
MEASURED_PICTURES = 16
"""Pictures of a token shard that are decoded to measure the round trip."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""What Pillow may decode. Of its other formats some start programs (EPS: Ghostscript) and few are tested."""
_PLUGINS = (TiffImagePlugin, WebPImagePlugin)
"""Pillow imports the plugins of the other formats by itself, and all that it has if one of FORMATS misses."""
_BEGINNINGS = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    *(f"P{digit}".encode() for digit in "0123456789Ffy"),
)
"""The first bytes of pictures of these formats, but for WEBP."""
_PEAK = 255.0
_ZOOMED_PX = 128
_MARGIN_PX = 4


def size_of(data: bytes) -> tuple[int, int] | None:
    """(width, height) that the header of an image file says; None for what is no picture, or a damaged one.

    Nothing is decoded. Raises SampleError for a picture above Pillow's own bound.
    """
    if data[:4] == b"\x89PNG" and data[12:16] == b"IHDR" and len(data) >= 24:
        # Pillow does the same in fifty times the time.
        return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp_size(data)
    if not data.startswith(_BEGINNINGS):
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data), formats=FORMATS).size
    except Image.DecompressionBombError as error:
        raise SampleError(f"the picture is too large: {error}") from None
    except Exception:  # Pillow's readers raise many kinds for damaged headers
        return None


def _webp_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a WebP file, for which Pillow would allocate its pixels already to open it."""
    kind, head = data[12:16], data[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        return 1 + int.from_bytes(head[4:7], "little"), 1 + int.from_bytes(head[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(head[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        return int.from_bytes(head[6:8], "little") & 0x3FFF, int.from_bytes(head[8:10], "little") & 0x3FFF
    return None


def read_picture(data: bytes) -> np.ndarray:
    """uint8 [H, W, 3] of an image file: upright (EXIF), transparency on white, 16-bit grey scaled to 8.

    Raises SampleError for a file that is of none of FORMATS, or that Pillow cannot decode whole.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that is not used
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            picture.load()
            picture = ImageOps.exif_transpose(picture)
    except UnidentifiedImageError:
        raise SampleError(
            f"the picture cannot be decoded: it is not of a known format; known: {', '.join(FORMATS)}"
        ) from None
    except Exception as error:  # Pillow's decoders raise many kinds for damaged files
        raise SampleError(f"the picture cannot be decoded: {error}") from None
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray((np.asarray(picture).astype(np.uint16) >> 8).astype(np.uint8))
    elif picture.mode in ("I", "F"):
        raise SampleError(
            f"pictures of mode {picture.mode} (32 bits a pixel) have no known range; store 8 or 16"
        )
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.asarray(picture.convert("RGB"))


def fit_picture(picture: np.ndarray, size_px: int, fit: Fit) -> np.ndarray:
    """The picture as uint8 [size_px, size_px, 3]: cut to its centre, with black bars, or stretched. A picture
    of that size stays as it is.
    """
    size = size_px, size_px
    if picture.shape[:2] == size:
        return picture
    image = Image.fromarray(picture)
    if fit == "crop":
        image = ImageOps.fit(image, size, Image.Resampling.LANCZOS)
    elif fit == "pad":
        image = ImageOps.pad(image, size, Image.Resampling.LANCZOS, color="black")
    else:
        image = image.resize(size, Image.Resampling.LANCZOS)
    return np.asarray(image)


def psnr_db(squared_error_sum: float, count: int) -> float:
    """Peak signal-to-noise ratio over `count` values of 0 .. 255."""
    return float("inf") if squared_error_sum == 0 else 10 * np.log10(_PEAK**2 * count / squared_error_sum)


def _measure(
    tokenizer: Tokenizer, content: Any, codes: np.ndarray, figures: Mapping[str, float]
) -> dict[str, float]:
    """Squared error of decoded pictures; of a shard's first pictures only, since decoding takes time."""
    if figures.get("decoded_pictures", 0) >= MEASURED_PICTURES:
        return {"pictures": 1}
    error = tokenizer.decode(codes).astype(np.float64) - content
    return {
        "pictures": 1,
        "decoded_pictures": 1,
        "decoded_values": error.size,
        "decoded_squared_error": float((error**2).sum()),
    }


def _summary(figures: Mapping[str, float]) -> str | None:
    if not figures.get("decoded_pictures"):
        return None
    if not figures["decoded_squared_error"]:
        return f"decode(encode(x)) is x, to the bit, over {_share(figures)}"
    quality = psnr_db(figures["decoded_squared_error"], int(figures["decoded_values"]))
    return f"PSNR of decode(encode(x)) {quality:.1f} dB, over {_share(figures)}"


def _share(figures: Mapping[str, float]) -> str:
    return f"{figures['decoded_pictures']} of {figures['pictures']} pictures"


def picture_page(pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return a page, uint8 [H, W, 3]: a column a pair, first above second, enlarged without smoothing."""
    zoom = max(1, _ZOOMED_PX // pairs[0][0].shape[0])
    columns = [np.concatenate([_framed(picture, zoom) for picture in pair], axis=0) for pair in pairs]
    return np.concatenate(columns, axis=1)


def _framed(picture: np.ndarray, zoom: int) -> np.ndarray:
    enlarged = picture.repeat(zoom, axis=0).repeat(zoom, axis=1)
    return np.pad(enlarged, ((_MARGIN_PX,) * 2, (_MARGIN_PX,) * 2, (0, 0)), constant_values=128)


def _show(pairs: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    return png(picture_page(pairs))


def png(picture: np.ndarray) -> bytes:
    """A PNG file of a picture, uint8 [H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


PICTURES = Medium(_measure, _summary, num_shown=12, suffix="png", show=_show, file=png)
