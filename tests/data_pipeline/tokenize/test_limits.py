import json

import numpy as np
import pytest

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import tokenize_config
from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.raw import SampleError
from tests.data_pipeline.hostile_files import png_file, saved, wave_file
from tests.data_pipeline.raw_documents import picture, png, tone, wav


def sample_of(modality: str, content: bytes | None) -> dict[str, bytes | None]:
    return {"json": json.dumps({"parts": [{modality: "0.bin"}]}).encode(), "0.bin": content}


def refusal(modality: str, content: bytes | None, **limits: float) -> str:
    with pytest.raises(SampleError) as error:
        parts_within(sample_of(modality, content), Limits(**limits))
    return str(error.value)


def test_pictures_are_judged_by_their_headers() -> None:
    huge = png_file(9400, 9400)
    assert "9400 x 9400 pixels is above limits.picture_mpx = 50" in refusal("image", huge)
    assert len(parts_within(sample_of("image", huge), Limits(picture_mpx=89))) == 1
    canvas = b"RIFF\0\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0" + b"\xfe\x3f\0" * 2
    assert "16383 x 16383 pixels" in refusal("image", canvas)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        assert len(parts_within(sample_of("image", saved(kind)), Limits())) == 1
        assert "16 x 16 pixels is above limits.picture_mpx = 0.0001" in refusal(
            "image", saved(kind), picture_mpx=1e-4
        )


@pytest.mark.parametrize("rate_hz", [0, 1, 999, 1_000_000_007, 2**32 - 1])
def test_rates_of_sound_are_judged_by_the_header(rate_hz: int) -> None:
    message = refusal("speech", wave_file(rate_hz=rate_hz))
    assert f"has a rate of {rate_hz} Hz; limits.wave_min_hz = 1000, limits.wave_max_hz = 384000" in message


def test_sound_has_a_longest_time_and_a_number_of_chunks() -> None:
    second = wav(tone(0, 1.0))
    assert "longer than limits.wave_s = 0.5" in refusal("speech", second, wave_s=0.5)
    assert len(parts_within(sample_of("speech", second), Limits(wave_s=1.01))) == 1
    chunks = wave_file(before=b"junk\0\0\0\0" * 5000)
    assert "more than 1000 chunks" in refusal("speech", chunks)


def test_files_that_were_too_large_to_be_read_are_said() -> None:
    assert "larger than limits.sample_mib = 2" in refusal("image", None, sample_mib=2)


def test_other_files_are_left_to_their_tokenizer() -> None:
    array = np.arange(9).tobytes()
    assert parts_within(sample_of("video", array), Limits())[0].data == array
    assert parts_within(sample_of("image", png(picture(1))), Limits())[0].modality == "image"


def test_limits_are_a_table_of_the_data_config() -> None:
    config = tokenize_config({"text": {}, "limits": {"picture_mpx": 20}}, "data.toml")
    assert config.limits == Limits(picture_mpx=20) and list(config.tables) == ["text"]
    assert config.values()["limits"] == {"picture_mpx": 20}
    assert "limits" not in tokenize_config({"text": {}}, "data.toml").values(), "as before there were limits"
    for limits, why in (
        ({"picture_mpx": 100}, "limits.picture_mpx = 100"),
        ({"pixels": 1}, "limits.pixels: unknown key"),
        ({"wave_min_hz": 500_000}, "wave_min_hz = 500000 is above"),
        ({"sample_timeout_s": float("nan")}, "limits.sample_timeout_s"),
        ({"sample_memory_gib": float("inf")}, "limits.sample_memory_gib"),
        (3, "limits"),
    ):
        with pytest.raises(ConfigError, match=why):
            tokenize_config({"text": {}, "limits": limits}, "data.toml")
