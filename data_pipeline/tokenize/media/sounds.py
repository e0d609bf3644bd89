"""Compressed sound: FLAC, MP3 and Ogg (Vorbis, Opus), decoded by libsndfile (the package soundfile)."""

import io
from typing import Any

import numpy as np

from data_pipeline.tokenize.raw import SampleError

_BEGINNINGS = (b"fLaC", b"OggS", b"ID3")


def is_compressed_sound(data: bytes) -> bool:
    """Whether the first bytes are those of FLAC, Ogg or MP3."""
    return data.startswith(_BEGINNINGS) or _is_mp3_frame(data)


def _is_mp3_frame(data: bytes) -> bool:
    """Whether the data begins with the header of a frame of MPEG layer III, as an MP3 file may."""
    if len(data) < 4 or data[0] != 0xFF or data[1] & 0xE6 != 0xE2 or data[1] & 0x18 == 0x08:
        return False
    return data[2] & 0xF0 not in (0, 0xF0) and data[2] & 0x0C != 0x0C and data[3] & 0x03 != 0x02


def sound_header(data: bytes) -> tuple[int, float]:
    """(rate in Hz, seconds) of compressed sound; nothing is decoded. Raises SampleError."""
    with _opened(data) as file:
        return file.samplerate, file.frames / max(1, file.samplerate)


def decode_sound(data: bytes) -> tuple[int, np.ndarray]:
    """(rate in Hz, float32 [samples, channels]) of compressed sound. Raises SampleError."""
    with _opened(data) as file:
        frames = file.frames
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except Exception as error:  # libsndfile's errors, and MemoryError
            raise SampleError(f"the sound cannot be decoded: {_why(error)}") from None
        if len(samples) < frames:
            raise SampleError(
                f"the sound ends after {len(samples)} of the {frames} frames that it should have"
            )
        return file.samplerate, samples


def _opened(data: bytes) -> Any:
    try:
        import soundfile  # Here because it is an extra, and most data needs none.
    except (ImportError, OSError):
        raise SampleError(
            'FLAC, MP3 and Ogg need the package soundfile: pip install "motley[formats]"'
        ) from None
    try:
        return soundfile.SoundFile(io.BytesIO(data))
    except Exception as error:  # libsndfile's errors
        raise SampleError(f"the sound cannot be decoded: {_why(error)}") from None


def _why(error: Exception) -> str:
    """Return what libsndfile says, without the name of the object that was read."""
    return str(getattr(error, "error_string", error))
