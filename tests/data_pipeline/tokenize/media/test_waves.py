import io
import wave

import numpy as np
import pytest
from scipy.io import wavfile

from data_pipeline.tokenize.media.waves import RATE_HZ, read_wave
from data_pipeline.tokenize.raw import SampleError
from tests.data_pipeline.raw_documents import tone, wav


def file_of(samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate_hz, samples)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int32, np.float32])
def test_sample_formats_mean_the_same(kind: type) -> None:
    sine = np.sin(np.arange(800) / 9) * 0.5
    if kind is np.float32:
        stored = sine.astype(np.float32)
    elif kind is np.uint8:
        stored = np.round(sine * 128 + 128).astype(np.uint8)
    else:
        stored = np.round(sine * -float(np.iinfo(kind).min)).astype(kind)
    # half a step of 8 bits is 1/256
    assert np.abs(read_wave(file_of(stored)) - sine).max() < 1 / 200


def test_24_bits_and_channels_and_rates() -> None:
    packed = (np.array([[0.5, -0.25]] * 1000) * 2**23).astype("<i4").view(np.uint8).reshape(-1, 4)[:, :3]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 3, RATE_HZ, 1000, "NONE", ""))
        file.writeframes(packed.tobytes())
    assert np.allclose(read_wave(buffer.getvalue()), 0.125)
    slow = np.sin(np.arange(8000) * 2 * np.pi * 100 / 8000).astype(np.float32)
    quick = read_wave(file_of(slow, 8000))
    assert len(quick) == 16000
    # away from the ends the resampled sine is within the ripple of the filter, .0005 measured
    middle = np.sin(np.arange(16000) * 2 * np.pi * 100 / 16000)[2000:-2000]
    assert np.abs(quick[2000:-2000] - middle).max() < 0.002


@pytest.mark.parametrize(
    "data",
    [b"", b"RIFFxxxxWAVE", wav(tone(0))[:-100], wav(tone(0))[:30]],
    ids=["empty", "no", "cut", "header"],
)
def test_what_cannot_be_decoded_whole_is_said(data: bytes) -> None:
    with pytest.raises(SampleError, match="the wave file cannot be decoded"):
        read_wave(data)


def test_samples_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SampleError, match="no numbers"):
        read_wave(file_of(np.array([0, np.nan], np.float32)))


@pytest.mark.parametrize("value", [1e30, -1e30, 2.0**25, 1e300])
def test_sound_beyond_the_range_of_spectra_is_refused(value: float) -> None:
    with pytest.raises(SampleError, match=r"samples above|no numbers"):
        read_wave(file_of(np.full(800, value, np.float64 if abs(value) > 1e200 else np.float32)))
    assert np.abs(read_wave(file_of(np.full(800, 2.0**15, np.float32)))).max() == 2.0**15


def test_a_rate_of_zero_is_refused() -> None:
    data = bytearray(wav(tone(0)))
    data[24:32] = bytes(8)  # the rate, and the bytes a second that follow from it
    with pytest.raises(SampleError, match="a rate of 0 Hz"):
        read_wave(bytes(data))
