import io
import subprocess
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from data_pipeline.tokenize.media.pictures import (
    FORMATS,
    Fit,
    fit_picture,
    picture_page,
    psnr_db,
    read_picture,
    size_of,
)
from data_pipeline.tokenize.raw import SampleError
from tests.data_pipeline.raw_documents import picture, png


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_transparency_is_white_and_grey_is_colour() -> None:
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    assert read_picture(saved(clear)).tolist() == [[[255, 255, 255], [0, 0, 255]]]
    assert read_picture(saved(Image.new("L", (1, 1), 77))).tolist() == [[[77, 77, 77]]]
    deep = Image.fromarray(np.array([[0, 65535, 32768]], np.uint16))
    assert read_picture(saved(deep))[0, :, 0].tolist() == [0, 255, 128]


def test_orientation_of_a_camera_is_obeyed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    assert read_picture(saved(Image.new("RGB", (4, 2)), "JPEG", exif=exif)).shape == (4, 2, 3)


@pytest.mark.parametrize("data", [b"", b"no picture", png(picture(1))[:-30]])
def test_what_cannot_be_decoded_whole_is_said(data: bytes) -> None:
    with pytest.raises(SampleError, match="the picture cannot be decoded"):
        read_picture(data)


def test_pixels_without_a_known_range_are_refused() -> None:
    with pytest.raises(SampleError, match="mode F"):
        read_picture(saved(Image.new("F", (2, 2)), "TIFF"))


def test_other_sizes_are_cropped_padded_or_stretched() -> None:
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, :16] = 200
    wide[:, 16:32] = 100
    fitted = {fit: fit_picture(wide, 16, fit) for fit in get_args(Fit)}
    assert {pixels.shape for pixels in fitted.values()} == {(16, 16, 3)}
    assert (fitted["crop"] == 100).all(), "the middle third"
    assert (fitted["pad"][:4] == 0).all() and fitted["pad"][8, 1, 0] > 190
    assert fitted["stretch"][0, 1, 0] > 190 and abs(int(fitted["stretch"][0, 8, 0]) - 100) < 9
    assert (fit_picture(wide[:, :16], 16, "crop") == 200).all()


def test_the_signal_to_noise_ratio_is_relative_to_the_full_scale() -> None:
    assert psnr_db(255.0**2, 1) == 0 and psnr_db(255.0**2, 10) == pytest.approx(10)
    assert psnr_db(0.0, 5) == float("inf")


def test_originals_stand_above_what_was_decoded() -> None:
    pairs = [
        (np.full((32, 32, 3), 10 * i, np.uint8), np.full((32, 32, 3), 10 * i + 5, np.uint8)) for i in range(3)
    ]
    page = picture_page(pairs)
    side = 32 * 4 + 2 * 4
    assert page.shape == (2 * side, 3 * side, 3)
    for column in range(3):
        assert (page[4 : side - 4, column * side + 4 : (column + 1) * side - 4] == 10 * column).all()
        assert (page[side + 4 : -4, column * side + 4 : (column + 1) * side - 4] == 10 * column + 5).all()


@pytest.mark.parametrize("kind", FORMATS)
def test_known_formats_are_decoded_and_their_size_is_known_before(kind: str) -> None:
    data = saved(Image.fromarray(picture(4)), kind)
    assert read_picture(data).shape == (16, 16, 3) and size_of(data) == (16, 16)


@pytest.mark.parametrize("kind", ["EPS", "PDF", "ICO", "TGA", "PCX"])
def test_other_formats_are_refused_and_start_no_program(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.fromarray(picture(4)), kind)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(SampleError, match="not of a known format; known: PNG, JPEG, WEBP, GIF"):
        read_picture(data)
    assert size_of(data) is None


def test_lossless_and_large_webp_tell_their_size() -> None:
    assert size_of(saved(Image.new("RGB", (300, 7)), "WEBP", lossless=True)) == (300, 7)
    assert size_of(saved(Image.new("RGBA", (20, 301)), "WEBP", exif=b"Exif\0\0")) == (20, 301)
    assert size_of(b"RIFF\0\0\0\0WEBPVP8X") is not None
