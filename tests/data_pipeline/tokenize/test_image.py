import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import ImageConfig
from data_pipeline.tokenize.image import (
    PatchTokenizer,
    fit_patches,
    fit_picture,
    from_patches,
    psnr_db,
    read_picture,
    to_patches,
)
from data_pipeline.tokenize.raw import SampleError
from tests.data_pipeline.raw_documents import picture, png

CONFIG = ImageConfig(size_px=16, patch_px=4, num_codes=40, num_verbatim=4)


def noisy(seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-9, 10, (16, 16, 3))
    return np.clip(picture(seed) + noise, 0, 255).astype(np.uint8)


PICTURES = [noisy(seed) for seed in range(60)]
TOKENIZER = fit_patches(PICTURES, CONFIG, seed=1)


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_patches_are_cut_in_reading_order_and_put_back() -> None:
    pixels = noisy(3)
    patches = to_patches(pixels, 4)
    assert patches.shape == (16, 48)
    assert (patches[6].reshape(4, 4, 3) == pixels[4:8, 8:12]).all()
    assert (from_patches(patches, 4) == pixels).all()


def test_each_patch_gets_the_nearest_code() -> None:
    patches = to_patches(noisy(99), 4).astype(np.int64)
    naive = [int(((TOKENIZER.codebook.astype(np.int64) - patch) ** 2).sum(1).argmin()) for patch in patches]
    assert TOKENIZER.encode(noisy(99)).tolist() == naive


def test_large_patches_are_as_exact() -> None:
    """Beyond 2^24 float32 would round distances: two codes that differ by one grey level are told apart."""
    config = ImageConfig(size_px=16, patch_px=16, num_codes=2, num_verbatim=2)
    codebook = np.full((2, 768), 255, np.uint8)
    codebook[1, 0] = 254
    tokenizer = PatchTokenizer(config, codebook)
    assert [tokenizer.encode(tokenizer.decode(np.array([code]))).item() for code in (0, 1)] == [0, 1]


def test_codes_decode_to_themselves() -> None:
    codes = np.arange(16)
    assert TOKENIZER.encode(TOKENIZER.decode(codes)).tolist() == codes.tolist()


def test_round_trip_is_close() -> None:
    errors = [TOKENIZER.decode(TOKENIZER.encode(pixels)).astype(float) - pixels for pixels in PICTURES]
    quality = psnr_db(sum((error**2).sum() for error in errors), sum(error.size for error in errors))
    # 27 colours of patch, 40 codes to hold them; what is left is the noise of +-9: 33.6 dB measured
    assert quality > 32
    assert psnr_db(0.0, 5) == float("inf")


def test_commonest_patches_are_kept_as_they_are() -> None:
    flat = np.full((16, 16, 3), 7, np.uint8)
    tokenizer = fit_patches([flat, *PICTURES[:5]], CONFIG, seed=1)
    assert (tokenizer.decode(tokenizer.encode(flat)) == flat).all()
    assert (tokenizer.codebook[0] == 7).all()


def test_fitting_is_deterministic_on_any_number_of_threads(tmp_path: Path) -> None:
    with threadpool_limits(2):
        again = fit_patches(PICTURES, CONFIG, seed=1)
    assert (again.codebook == TOKENIZER.codebook).all()
    assert again.fingerprint == TOKENIZER.fingerprint
    assert fit_patches(PICTURES, CONFIG, seed=2).fingerprint != TOKENIZER.fingerprint
    TOKENIZER.save(tmp_path)
    assert PatchTokenizer.load(tmp_path).fingerprint == TOKENIZER.fingerprint


def test_fewer_distinct_patches_than_codes() -> None:
    tokenizer = fit_patches([picture(0)], CONFIG, seed=1)
    assert tokenizer.size == len({patch.tobytes() for patch in to_patches(picture(0), 4)})
    assert (tokenizer.decode(tokenizer.encode(picture(0))) == picture(0)).all()
    with pytest.raises(ConfigError, match="no picture to fit"):
        fit_patches([], CONFIG, seed=1)


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
    fitted = {
        fit: fit_picture(wide, CONFIG.model_copy(update={"fit": fit})) for fit in ("crop", "pad", "stretch")
    }
    assert {pixels.shape for pixels in fitted.values()} == {(16, 16, 3)}
    assert (fitted["crop"] == 100).all(), "the middle third"
    assert (fitted["pad"][:4] == 0).all() and fitted["pad"][8, 1, 0] > 190
    assert fitted["stretch"][0, 1, 0] > 190 and abs(int(fitted["stretch"][0, 8, 0]) - 100) < 9
    assert (fit_picture(wide[:, :16], CONFIG) == 200).all()
