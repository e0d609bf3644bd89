import io
import wave
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from scipy.io import wavfile
from threadpoolctl import threadpool_limits

from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.config import SpeechConfig
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.speech import RATE_HZ, UnitTokenizer, fit_units, log_mel, read_wave
from tests.data_pipeline.raw_documents import tone, wav

CONFIG = SpeechConfig(num_units=12, merge_repeats=False)
WAVES = [tone(seed, 1.0).astype(np.float32) / 32768 for seed in range(12)]
TOKENIZER = fit_units(WAVES, CONFIG, seed=1)


def file_of(samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    wavfile.write(buffer, rate_hz, samples)
    return buffer.getvalue()


def test_a_unit_every_fortieth_of_a_second_or_as_configured() -> None:
    for seconds in (0.04, 0.5, 1.01):
        noise = np.random.default_rng(0).normal(size=int(seconds * RATE_HZ)).astype(np.float32)
        assert len(TOKENIZER.encode(noise)) == int(seconds * 25 + 1e-9)
    config = SpeechConfig(units_per_s=50, frames_per_unit=1)
    assert log_mel(WAVES[0], config).shape == (50, 40)


def test_each_unit_is_the_nearest_centre() -> None:
    rows = np.random.default_rng(0).integers(-127, 128, (20, 80)).astype(np.float32)
    naive = [int(((TOKENIZER.centres.astype(np.float64) - row) ** 2).sum(1).argmin()) for row in rows]
    assert TOKENIZER.nearest(rows).tolist() == naive


def test_pitch_changes_units_and_loudness_does_not() -> None:
    sound = WAVES[0]
    # all log-mel shift alike, but for those at the power floor: .92 - 1 measured over these waves
    assert np.mean(TOKENIZER.encode(sound) == TOKENIZER.encode(sound / 2)) > 0.8
    assert len(set(TOKENIZER.encode(sound))) > 2


def test_repeats_merge() -> None:
    merged = replace(TOKENIZER, config=SpeechConfig(num_units=12, merge_repeats=True))
    units = TOKENIZER.encode(WAVES[0])
    runs = [units[0], *(b for a, b in pairwise(units) if a != b)]
    assert merged.encode(WAVES[0]).tolist() == runs
    assert merged.fingerprint != TOKENIZER.fingerprint


def test_a_decoded_wave_is_the_same_units_again() -> None:
    units = TOKENIZER.encode(WAVES[3])
    sound = TOKENIZER.decode(units)
    assert np.abs(sound).max() <= 1 and np.isfinite(sound).all()
    assert abs(len(sound) / RATE_HZ - len(units) / 25) < 0.05
    again = TOKENIZER.encode(sound)
    shared = min(len(units), len(again))
    # .92 - .96 measured over these waves: phases are guessed, and edges between tones blur
    assert np.mean(again[:shared] == units[:shared]) > 0.8


def test_merged_units_are_decoded_with_their_usual_length() -> None:
    merged = fit_units(WAVES, SpeechConfig(num_units=12, merge_repeats=True), seed=1)
    sound = merged.decode(merged.encode(WAVES[0]))
    assert 0.5 < len(sound) / len(WAVES[0]) < 2


def test_fitting_is_deterministic_on_any_number_of_threads(tmp_path: Path) -> None:
    with threadpool_limits(2):
        again = fit_units(WAVES, CONFIG, seed=1)
    assert again.fingerprint == TOKENIZER.fingerprint
    TOKENIZER.save(tmp_path)
    loaded = UnitTokenizer.load(tmp_path)
    assert loaded.fingerprint == TOKENIZER.fingerprint
    assert loaded.encode(WAVES[0]).tolist() == TOKENIZER.encode(WAVES[0]).tolist()


def test_fewer_distinct_units_than_asked() -> None:
    assert fit_units([np.zeros(RATE_HZ, np.float32)], CONFIG, seed=1).size == 1
    with pytest.raises(ConfigError, match="no utterance to fit"):
        fit_units([], CONFIG, seed=1)


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


def test_no_numbers_and_too_short() -> None:
    with pytest.raises(SampleError, match="no numbers"):
        read_wave(file_of(np.array([0, np.nan], np.float32)))
    with pytest.raises(SampleError, match=r"shorter than one unit \(1/25 s\)"):
        TOKENIZER.encode(np.zeros(639, np.float32))
