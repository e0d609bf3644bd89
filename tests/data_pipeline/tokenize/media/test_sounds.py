import io

import numpy as np
import pytest
import soundfile

from data_pipeline.tokenize.limits import Limits, parts_within
from data_pipeline.tokenize.media.sounds import is_compressed_sound, sound_header
from data_pipeline.tokenize.media.waves import RATE_HZ, read_wave
from data_pipeline.tokenize.raw import SampleError
from tests.data_pipeline.raw_documents import picture, png, tone, wav

FORMATS = {
    "flac": ("FLAC", "PCM_16"),
    "vorbis": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", None),
}


def encoded(name: str, samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    kind, subtype = FORMATS[name]
    soundfile.write(buffer, samples, rate_hz, format=kind, subtype=subtype)
    return buffer.getvalue()


def sample_of(content: bytes) -> dict[str, bytes]:
    return {"json": b'{"parts": [{"speech": "0"}]}', "0": content}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(("rate_hz", "channels"), [(16_000, 1), (48_000, 2)])
def test_sound_is_what_went_in_at_16_khz(name: str, rate_hz: int, channels: int) -> None:
    times = np.arange(rate_hz) / rate_hz
    wave = (0.4 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)
    content = encoded(name, np.stack([wave] * channels, 1), rate_hz)
    assert is_compressed_sound(content) and sound_header(content) == (rate_hz, 1.0)
    found = read_wave(content)
    assert found.dtype == np.float32 and len(found) == RATE_HZ
    expected = 0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE_HZ) / RATE_HZ)
    middle = slice(2000, -2000)  # resampling and codecs bend the ends
    correlation = np.corrcoef(found[middle], expected[middle])[0, 1]
    assert correlation > 0.95, "lossy codecs give 0.995 and more; a wrong rate or channel gives below 0.1"


def test_flac_is_the_wave_bit_for_bit() -> None:
    samples = tone(3)
    assert np.array_equal(read_wave(encoded("flac", samples)), read_wave(wav(samples)))


def test_what_is_no_compressed_sound_is_left_alone() -> None:
    for content in (
        wav(tone(1)),
        png(picture(1)),
        b"",
        b"\xff",
        b"\xff" * 64,
        b"\xff\xd8\xff\xe0",
        bytes(64),
    ):
        assert not is_compressed_sound(content)


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_sound_is_refused_by_name(name: str) -> None:
    content = encoded(name, tone(2, 1.0))
    for damaged in (content[:4] + bytes(100), content[:60]):
        with pytest.raises(SampleError, match=r"the sound|the wave file"):
            parts_within(sample_of(damaged), Limits())
            read_wave(damaged)


def test_length_and_rate_are_judged_by_the_header() -> None:
    second = encoded("flac", tone(1, 1.0))
    assert len(parts_within(sample_of(second), Limits(wave_s=1.01))) == 1
    with pytest.raises(SampleError, match=r"the sound is longer than limits.wave_s = 0.5"):
        parts_within(sample_of(second), Limits(wave_s=0.5))
    with pytest.raises(SampleError, match=r"the sound has a rate of 16000 Hz; limits.wave_min_hz = 20000"):
        parts_within(sample_of(second), Limits(wave_min_hz=20_000))
    lying = bytearray(second)  # STREAMINFO's number of samples, 36 bits at byte 21: hours that are not there
    lying[21] |= 0x0F
    lying[22:26] = b"\xff" * 4
    with pytest.raises(SampleError, match=r"longer than limits.wave_s"):
        parts_within(sample_of(bytes(lying)), Limits())
