"""Speech of the demo corpus: espeak-ng as a library, from the package `espeakng-loader`, through ctypes.

espeak-ng carries state from one utterance to the next, so the same text spoken twice in a process
differs by some samples, while a fresh process that makes the same calls gives the same bytes. Therefore each
shard is made in a process of its own.
"""

import ctypes
import io
import math
import wave
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

import numpy as np

from data_pipeline.files.toml_config import ConfigError

RATE_HZ = 16_000
ACCENTS = ("en-us", "en-gb-x-rp", "en-gb-scotland", "en-us-nyc")
# Timbres with "breath" in their file (+f2, +whisper ...) are left out: the time of day seeds their noise.
TIMBRES = ("", "+m1", "+m3", "+m7", "+f1", "+f4", "+linda", "+belinda", "+klatt2", "+Andy")
WORDS_PER_MINUTE = (165, 215)
PITCH_PERCENT = (30, 70)

# Constants of espeak-ng's speak_lib.h, version 1.52.
_SYNCHRONOUS_OUTPUT = 2
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_PARAMETER_RATE, _PARAMETER_PITCH = 1, 3
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)

_HUSH = 1 / 100
"""Samples below this share of full scale are silence, at the ends of an utterance."""
_PAD_S = 0.04
"""Seconds of silence that stay at both ends of an utterance."""


@dataclass(frozen=True)
class Voice:
    """A speaker; `name` is espeak-ng's name of an accent and a timbre."""

    name: str
    words_per_minute: int
    pitch_percent: int


def draw_voice(random: Random) -> Voice:
    """A random speaker: an accent, a timbre, a rate and a pitch."""
    name = random.choice(ACCENTS) + random.choice(TIMBRES)
    return Voice(name, random.randint(*WORDS_PER_MINUTE), random.randint(*PITCH_PERCENT))


class Speaker:
    """espeak-ng in this process. Raises ConfigError, with the reason, where it cannot be loaded."""

    def __init__(self) -> None:
        try:
            import espeakng_loader

            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
            data = espeakng_loader.get_data_path()
        except (ImportError, OSError, RuntimeError) as error:
            raise ConfigError(
                f"speech cannot be made: espeak-ng does not load ({error}). The demo corpus needs the "
                "package espeakng-loader: pip install -c constraints.txt -e '.[demo]'"
            ) from None
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version: str = self._library.espeak_Info(None).decode()
        self._rate_hz = self._library.espeak_Initialize(_SYNCHRONOUS_OUTPUT, 0, data.encode(), 0)
        if self._rate_hz <= 0:
            raise ConfigError(f"speech cannot be made: espeak-ng {self.version} finds no voices in {data}")
        self._chunks: list[bytes] = []
        self._callback = _CALLBACK(self._receive)  # kept: ctypes frees a callback that nothing refers to
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _events: object) -> int:
        if count > 0:
            self._chunks.append(ctypes.string_at(samples, 2 * count))
        return 0

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """The utterance, int16 [samples] at RATE_HZ, without the silence around it."""
        self._chunks.clear()
        status = self._library.espeak_SetVoiceByName(voice.name.encode())
        assert status == 0, f"{voice.name}: {status}"
        self._library.espeak_SetParameter(_PARAMETER_RATE, voice.words_per_minute, 0)
        self._library.espeak_SetParameter(_PARAMETER_PITCH, voice.pitch_percent, 0)
        data = text.encode() + b"\0"
        status = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data)), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        spoken = np.frombuffer(b"".join(self._chunks), np.int16)
        if status != 0 or not spoken.size:
            raise ConfigError(f'speech cannot be made: espeak-ng {self.version} fails on "{text}" ({status})')
        return _trim(_resample(spoken, self._rate_hz))


def _resample(samples: np.ndarray, rate_hz: int) -> np.ndarray:
    from scipy.signal import resample_poly  # Here because its import takes a second.

    up, down = _ratio(rate_hz)
    resampled = resample_poly(samples.astype(np.float32), up, down, window=_low_pass(max(up, down)))
    return np.clip(np.round(resampled), -32768, 32767).astype(np.int16)


def _ratio(rate_hz: int) -> tuple[int, int]:
    shared = math.gcd(RATE_HZ, rate_hz)
    return RATE_HZ // shared, rate_hz // shared


@cache
def _low_pass(largest: int) -> np.ndarray:
    """The low-pass filter of resample_poly, which would otherwise compute it for every utterance."""
    from scipy.signal import firwin

    window: Any = ("kaiser", 5.0)  # scipy takes a pair, its annotations do not
    return np.asarray(firwin(20 * largest + 1, 1 / largest, window=window), np.float32)


def _trim(samples: np.ndarray) -> np.ndarray:
    loud = np.flatnonzero(np.abs(samples.astype(np.int32)) > _HUSH * 32768)
    pad = int(_PAD_S * RATE_HZ)
    return samples[max(0, loud[0] - pad) : loud[-1] + pad] if loud.size else samples


def wav(samples: np.ndarray) -> bytes:
    """WAV file of mono int16 samples at RATE_HZ."""
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.astype("<i2").tobytes())
    return buffer.getvalue()
