"""The picture for a README."""

import io
from collections.abc import Callable

from PIL import Image

from pretrain.comparison.findings import Findings
from pretrain.comparison.report import picture


def test_the_picture_for_a_readme_is_large_and_wide(make_findings: Callable[..., Findings]) -> None:
    image = Image.open(io.BytesIO(picture.summary_png(make_findings(seeds=(1,)))))
    assert image.width > 1800 and 1.8 < image.width / image.height < 2.6
    assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255)


def test_more_arms_make_a_forest_per_modality(make_findings: Callable[..., Findings]) -> None:
    third = '[arms.pair.model]\ntowers = {text = "text", image = "other", speech = "other"}\n'
    image = Image.open(io.BytesIO(picture.summary_png(make_findings(edit=lambda text: text + third))))
    assert image.width > 1800 and image.width / image.height > 2.6
