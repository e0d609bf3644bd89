"""Sound of raw documents: decoding it, and how many tokens a second of it takes."""

import io
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy.io import wavfile

from data_pipeline.tokenize.media.sounds import decode_sound, is_compressed_sound
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import Medium, Tokenizer

RATE_HZ = 16_000
_LOUDEST = 2.0**24
"""Largest sample, in full scales, of a float file: above what integers of 24 bits give that were not scaled.
Spectra of louder sound leave the range of float32."""
_PAUSE_S = 0.4
"""Silence between an original and its decoded copy, and before the next pair."""


def read_wave(data: bytes) -> np.ndarray:
    """float32 [samples] at RATE_HZ in -1 .. 1, channels averaged, of a WAV, FLAC, MP3 or Ogg file.

    Raises SampleError.
    """
    try:
        if is_compressed_sound(data):
            rate_hz, samples = decode_sound(data)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Reached EOF", category=wavfile.WavFileWarning)
                warnings.filterwarnings("ignore", message="Chunk", category=wavfile.WavFileWarning)
                rate_hz, samples = wavfile.read(io.BytesIO(data))
    except SampleError:
        raise
    except Exception as error:  # scipy raises many kinds for damaged files
        raise SampleError(f"the wave file cannot be decoded: {error}") from None
    if np.issubdtype(samples.dtype, np.integer):
        middle = 128 if samples.dtype == np.uint8 else 0  # 8-bit WAV is unsigned
        samples = (samples.astype(np.float32) - middle) / -float(np.iinfo(samples.dtype).min or -128)
    with np.errstate(over="ignore"):  # float64 that float32 cannot hold becomes infinite, and is refused
        samples = samples.astype(np.float32)
    if samples.ndim == 2:
        samples = samples.mean(1)
    if not np.isfinite(samples).all():
        raise SampleError("the wave file holds samples that are no numbers")
    if len(samples) and np.abs(samples).max() > _LOUDEST:
        raise SampleError(f"the wave file holds samples above {_LOUDEST:g}; full scale is 1")
    if rate_hz != RATE_HZ:
        samples = _resampled(samples, rate_hz)
    return samples


def _resampled(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    """float32 samples at RATE_HZ. Raises SampleError for a rate of zero."""
    from scipy.signal import resample_poly  # Here because its import takes a second.

    if rate_hz < 1:
        raise SampleError(f"the wave file has a rate of {rate_hz} Hz")
    shared = math.gcd(rate_hz, RATE_HZ)
    return resample_poly(samples, RATE_HZ // shared, rate_hz // shared).astype(np.float32)


def _measure(_: Tokenizer, content: Any, codes: np.ndarray, __: Mapping[str, float]) -> dict[str, float]:
    return {"speech_s": len(content) / RATE_HZ, "speech_units": len(codes), "utterances": 1}


def _summary(figures: Mapping[str, float]) -> str | None:
    if not figures.get("speech_s"):
        return None
    rate = figures["speech_units"] / figures["speech_s"]
    hours = figures["speech_s"] / 3600
    return f"{rate:.1f} units a second, {hours:.2f} h in {figures['utterances']} utterances"


def _show(pairs: list[tuple[np.ndarray, np.ndarray]]) -> bytes:
    """A WAV file in which each wave is followed by its decoded copy."""
    pause = np.zeros(int(_PAUSE_S * RATE_HZ), np.float32)
    return wav(np.concatenate([sound for pair in pairs for wave in pair for sound in (wave, pause)]))


def wav(wave: np.ndarray) -> bytes:
    """A WAV file of 16 bits of a wave in -1 .. 1 at RATE_HZ."""
    buffer = io.BytesIO()
    wavfile.write(buffer, RATE_HZ, np.round(wave * 32767).astype(np.int16))
    return buffer.getvalue()


WAVES = Medium(_measure, _summary, num_shown=4, suffix="wav", show=_show, file=wav)
