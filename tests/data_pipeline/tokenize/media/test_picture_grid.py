import io

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_pipeline.tokenize.media.picture_grid import PictureGrid, from_patches, read_grid, to_patches


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_are_cut_in_reading_order_and_put_back(channels: int) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, channels)).astype(np.uint8)
    patches = to_patches(pixels, 4)
    assert patches.shape == (16, 16 * channels)
    assert (patches[6].reshape(4, 4, channels) == pixels[4:8, 8:12]).all()
    assert (from_patches(patches, 4) == pixels).all()


def test_a_file_becomes_a_picture_of_the_grid() -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((20, 40, 3), (9, 99, 199), np.uint8)).save(file, "PNG")
    config = PictureGrid(size_px=8, patch_px=2)
    assert config.content_codes == 16
    picture = read_grid(file.getvalue(), config)
    assert picture.shape == (8, 8, 3) and (picture == (9, 99, 199)).all()
    with pytest.raises(ValidationError, match="size_px = 9 is not a multiple of patch_px = 2"):
        PictureGrid(size_px=9, patch_px=2)
