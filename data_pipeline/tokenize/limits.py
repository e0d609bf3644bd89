"""Limits of raw samples, and the parts of a sample that keeps them: headers are judged before anything is
decoded.
"""

import struct
from collections.abc import Iterator

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from data_pipeline.shards.tar import Sample
from data_pipeline.tokenize.layout import RAW, SourceSettings, parts_of
from data_pipeline.tokenize.media.sounds import is_compressed_sound, sound_header
from data_pipeline.tokenize.raw import Part, SampleError

_MIB = 1 << 20
_RIFF, _WAVE_BYTES = (b"RIFF", b"RIFX", b"RF64"), 12
_MOST_CHUNKS = 1000
"""Chunks that a wave file may have."""


class Limits(BaseModel):
    """The table [limits] of a data.toml. A sample beyond a limit is named, counted and left out."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    sample_mib: float = Field(256, gt=0, le=1e6)
    """All files of a sample together."""
    picture_mpx: float = Field(50, gt=0, le=89)
    """Millions of pixels of a picture; Pillow's own bound is 89."""
    wave_s: float = Field(3600, gt=0, le=1e6)
    """Seconds of a sound."""
    wave_min_hz: PositiveInt = 1000
    wave_max_hz: PositiveInt = 384_000
    """Sampling rates of sound."""
    sample_timeout_s: float = Field(60, ge=0.01, le=86_400)
    """Seconds in which a sample must be decoded and encoded."""
    sample_memory_gib: float = Field(4, gt=0, le=1e5)
    """Memory that a process may take for decoding, beside what it has at its start."""

    @model_validator(mode="after")
    def _check(self) -> "Limits":
        if self.wave_min_hz > self.wave_max_hz:
            raise ValueError(f"wave_min_hz = {self.wave_min_hz} is above wave_max_hz = {self.wave_max_hz}")
        return self

    @property
    def sample_bytes(self) -> int:
        return int(self.sample_mib * _MIB)


def parts_within(
    sample: Sample, limits: Limits, *, key: str = "", source: SourceSettings = RAW
) -> list[Part]:
    """The parts of a sample, as `source` declares them. Raises SampleError for what the layout does not
    allow, and beyond a limit.
    """
    read = {name: content for name, content in sample.items() if content is not None}
    if len(read) < len(sample):
        raise SampleError(f"its files are larger than limits.sample_mib = {limits.sample_mib:g}")
    parts = parts_of(key, read, source)
    for part in parts:
        if isinstance(part.data, bytes):
            _check_wave(part.data, limits)
            _check_sound(part.data, limits)
            _check_picture(part.data, limits)
    return parts


def _check_picture(data: bytes, limits: Limits) -> None:
    """Raise SampleError for a picture of too many pixels, by its header. What is no picture passes, since its
    tokenizer judges it.
    """
    from data_pipeline.tokenize.media.pictures import size_of  # Here because Pillow's import takes time.

    size = size_of(data)
    if size is not None and size[0] * size[1] > limits.picture_mpx * 1e6:
        raise SampleError(
            f"a picture of {size[0]} x {size[1]} pixels is above limits.picture_mpx = {limits.picture_mpx:g}"
        )


def _check_wave(data: bytes, limits: Limits) -> None:
    """Raise SampleError for a wave file of an illegal rate or a length above the limit, by its header. What
    is no wave file passes.
    """
    for rate_hz, bytes_per_s, num_bytes in _wave_headers(data):
        _check_heard("the wave file", rate_hz, num_bytes > limits.wave_s * bytes_per_s, limits)


def _check_sound(data: bytes, limits: Limits) -> None:
    """Raise SampleError for FLAC, MP3 or Ogg of an illegal rate or length, by its header."""
    if not is_compressed_sound(data):
        return
    rate_hz, seconds = sound_header(data)
    _check_heard("the sound", rate_hz, seconds > limits.wave_s, limits)


def _check_heard(what: str, rate_hz: int, too_long: bool, limits: Limits) -> None:
    """Raise SampleError for a sampling rate outside the limits, or a sound that is `too_long` for them."""
    if not limits.wave_min_hz <= rate_hz <= limits.wave_max_hz:
        raise SampleError(
            f"{what} has a rate of {rate_hz} Hz; limits.wave_min_hz = {limits.wave_min_hz}, "
            f"limits.wave_max_hz = {limits.wave_max_hz}"
        )
    if too_long:
        raise SampleError(f"{what} is longer than limits.wave_s = {limits.wave_s:g}")


def _wave_headers(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(rate in Hz, bytes a second, bytes of the file) for each `fmt ` chunk of a wave file.

    Bytes a second follow from the rate and the size of a frame, which decoders use; the header's own field is
    used by none.
    """
    if data[:4] not in _RIFF or data[8:12] != b"WAVE":
        return
    order = ">" if data[:4] == b"RIFX" else "<"
    position = _WAVE_BYTES
    for _ in range(_MOST_CHUNKS):
        if position + 8 > len(data):
            return
        name = data[position : position + 4]
        (size,) = struct.unpack_from(f"{order}I", data, position + 4)
        if name == b"fmt " and position + 24 <= len(data):
            _, _, rate_hz, _, frame_bytes, _ = struct.unpack_from(f"{order}HHIIHH", data, position + 8)
            yield rate_hz, rate_hz * max(1, frame_bytes), len(data)
        position += 8 + size + size % 2
    raise SampleError(f"the wave file has more than {_MOST_CHUNKS} chunks")
