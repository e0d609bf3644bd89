"""Speech <-> tokens: a few log-mel frames at a time become the nearest unit of a k-means codebook."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, PositiveInt, model_validator
from threadpoolctl import threadpool_limits

from data_pipeline.files.atomic import atomic_file
from data_pipeline.files.toml_config import ConfigError
from data_pipeline.tokenize.media.waves import RATE_HZ, WAVES, read_wave
from data_pipeline.tokenize.raw import SampleError
from data_pipeline.tokenize.tokenizer import Medium, TokenizerConfig, TokenizerKind, fingerprint_of

CODEBOOK = "codebook.npz"
_WINDOW = 512
"""A frame is so many samples: 32 ms."""
_POWER_FLOOR = 1e-3
_FRAMES_AT_ONCE = 4096
"""Frames are transformed in groups of so many, which bounds the memory that an hour of speech takes."""
_STEPS, _LARGEST = 32, 127
"""Features are whole numbers, _STEPS per standard deviation, up to _LARGEST: distances are exact then."""
_GRIFFIN_LIM_ROUNDS = 40


class UnitConfig(TokenizerConfig):
    """Settings of a codebook of units, stretches of log-mel frames."""

    units_per_s: PositiveInt = 25
    frames_per_unit: PositiveInt = 2
    num_units: int = Field(256, ge=2)
    num_mels: int = Field(40, ge=8, le=128)
    merge_repeats: bool = True
    """A unit that lasts is one token; how long it lasts is lost, and decoded as its usual duration."""
    fit_units: PositiveInt = 60_000
    """Stretches of 1 / units_per_s seconds that k-means sees."""

    @property
    def asked_size(self) -> int:
        return self.num_units

    @model_validator(mode="after")
    def _check(self) -> "UnitConfig":
        frames_per_s = self.units_per_s * self.frames_per_unit
        if RATE_HZ % frames_per_s or not 25 <= frames_per_s <= 400:
            raise ValueError(
                f"units_per_s * frames_per_unit = {frames_per_s} frames a second: must divide {RATE_HZ} and "
                "lie in 25 .. 400"
            )
        return self


@dataclass(frozen=True)
class UnitTokenizer:
    """A codebook of units: `centres` float32 [K, frames_per_unit * num_mels], whole numbers as `features`.

    `scale` float32 [num_mels] is the standard deviation of log-mel, `sounds` float32 [K,
    frames_per_unit, num_mels] each unit's mean log-mel and `durations` int32 [K] its usual number of
    repetitions, both for decoding.
    """

    medium: ClassVar[Medium | None] = WAVES

    config: UnitConfig
    centres: np.ndarray
    scale: np.ndarray
    sounds: np.ndarray
    durations: np.ndarray

    @property
    def size(self) -> int:
        return len(self.centres)

    @property
    def _arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in ("centres", "scale", "sounds", "durations")}

    @property
    def fingerprint(self) -> str:
        settings = {"kind": "log-mel units", **self.config.model_dump(mode="json")}
        return fingerprint_of(settings, *(array.tobytes() for array in self._arrays.values()))

    @cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        dtype = np.float32 if 2 * self.centres.shape[1] * _LARGEST**2 < 2**24 else np.float64
        centres = self.centres.astype(dtype)
        return -2 * centres.T, (centres * centres).sum(1)

    def read(self, data: bytes) -> np.ndarray:
        return read_wave(data)

    def encode(self, content: np.ndarray) -> np.ndarray:
        """Units int32 [n] of a float32 waveform at RATE_HZ."""
        units = self.encode_frames(content)
        if self.config.merge_repeats:
            units = units[np.flatnonzero(np.diff(units, prepend=-1))]
        return units

    def encode_frames(self, content: np.ndarray) -> np.ndarray:
        """Units before repeats are merged, int32 [seconds * units_per_s]."""
        return self.nearest(features(log_mel(content, self.config), self.scale, self.config.frames_per_unit))

    def nearest(self, stacked: np.ndarray) -> np.ndarray:
        """Nearest centre of each row of `features`, int32 [n]; the first of equally near centres."""
        minus_two_centres, squares = self._exact
        return (stacked.astype(squares.dtype) @ minus_two_centres + squares).argmin(1).astype(np.int32)

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """A waveform, float32 at RATE_HZ in -1 .. 1: understandable speech without a speaker's voice."""
        if self.config.merge_repeats:
            codes = np.repeat(codes, self.durations[codes])
        return waveform(self.sounds[codes].reshape(-1, self.config.num_mels), self.config)

    def save(self, folder: Path) -> None:
        with atomic_file(folder / CODEBOOK) as file:
            np.savez(file, **self._arrays)  # pyright: ignore[reportArgumentType]


def open_units(folder: Path, config: UnitConfig) -> UnitTokenizer:
    """The tokenizer that `UnitTokenizer.save` wrote."""
    with np.load(folder / CODEBOOK) as arrays:
        return UnitTokenizer(config, **{name: arrays[name] for name in arrays.files})


def _hop(config: UnitConfig) -> int:
    return RATE_HZ // (config.units_per_s * config.frames_per_unit)


@lru_cache(maxsize=4)
def _mel_filters(num_mels: int) -> np.ndarray:
    """Mel filters, float32 [num_mels, _WINDOW // 2 + 1]: triangles of one mel width, each of sum 1."""

    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)

    edges_mel = np.linspace(mel(60), mel(RATE_HZ / 2), num_mels + 2)
    edges = 700 * (10 ** (edges_mel / 2595) - 1)
    bins = np.linspace(0, RATE_HZ / 2, _WINDOW // 2 + 1)
    rising = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    filters = np.maximum(0, np.minimum(rising, falling))
    return (filters / np.maximum(filters.sum(1, keepdims=True), 1e-8)).astype(np.float32)


def log_mel(wave: np.ndarray, config: UnitConfig) -> np.ndarray:
    """Log-mel spectrum, float32 [frames, num_mels], a frame every hop, cut to whole units. Raises SampleError
    for a wave shorter than one unit.
    """
    hop = _hop(config)
    num_frames = len(wave) // (hop * config.frames_per_unit) * config.frames_per_unit
    if not num_frames:
        raise SampleError(f"the wave is shorter than one unit (1/{config.units_per_s} s)")
    padded = np.pad(wave, _WINDOW // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[hop // 2 :: hop][:num_frames]
    power = [
        np.abs(np.fft.rfft(frames[start : start + _FRAMES_AT_ONCE] * _hann(), axis=1)) ** 2
        @ _mel_filters(config.num_mels).T
        for start in range(0, num_frames, _FRAMES_AT_ONCE)
    ]
    return np.log(np.concatenate(power).astype(np.float32) + np.float32(_POWER_FLOOR))


@lru_cache(maxsize=1)
def _hann() -> np.ndarray:
    return np.hanning(_WINDOW + 1)[:-1].astype(np.float32)


def features(logs: np.ndarray, scale: np.ndarray, frames_per_unit: int) -> np.ndarray:
    """Features of units, whole numbers in float32 [units, frames_per_unit * num_mels]: log-mel less the mean
    of the utterance, divided by `scale`.

    The mean carries the speaker and the microphone; without it units carry more of the words.
    """
    centred = (logs - logs.mean(0)) / scale
    return np.clip(np.round(centred * _STEPS), -_LARGEST, _LARGEST).reshape(len(logs) // frames_per_unit, -1)


def fit_units(contents: Iterable[np.ndarray], config: UnitConfig, seed: int) -> UnitTokenizer:
    """k-means over units of some utterances; fewer units than asked for where fewer distinct ones occur."""
    from sklearn.cluster import MiniBatchKMeans

    waves = list(contents)
    if not waves:
        raise ConfigError("no utterance to fit the speech tokenizer on: no document has a speech part")
    random = np.random.default_rng(seed)
    logs: list[np.ndarray] = []
    for index in random.permutation(len(waves)):
        if len(waves[index]) >= RATE_HZ // config.units_per_s:
            logs.append(log_mel(waves[index], config))
        if sum(map(len, logs)) >= config.fit_units * config.frames_per_unit:
            break
    scale = np.concatenate([log - log.mean(0) for log in logs]).std(0) + 1e-3
    utterances = [features(log, scale, config.frames_per_unit) for log in logs]
    stacked = np.concatenate(utterances)
    num_units = min(config.num_units, len(np.unique(stacked, axis=0)))
    kmeans = MiniBatchKMeans(
        num_units,
        batch_size=4096,
        n_init=1,  # pyright: ignore[reportArgumentType]
        max_iter=20,
        random_state=seed,
    )
    with threadpool_limits(1):  # sums over threads come in any order
        kmeans.fit(stacked)
    centres = np.unique(np.round(np.asarray(kmeans.cluster_centers_)).astype(np.float32), axis=0)
    nearest = UnitTokenizer(config, centres, scale, *_unit_sounds([], [], len(centres), config)).nearest
    codes = [nearest(utterance) for utterance in utterances]
    return UnitTokenizer(config, centres, scale, *_unit_sounds(logs, codes, len(centres), config))


def _unit_sounds(
    logs: Sequence[np.ndarray], units: Sequence[np.ndarray], num_units: int, config: UnitConfig
) -> tuple[np.ndarray, np.ndarray]:
    """(mean log-mel, usual number of repetitions) of each unit in utterances of log-mel and units."""
    sums = np.zeros((num_units, config.frames_per_unit, config.num_mels))
    counts, runs = np.zeros(num_units), np.zeros(num_units)
    for log, codes in zip(logs, units, strict=True):
        np.add.at(sums, codes, log.reshape(len(codes), config.frames_per_unit, config.num_mels))
        np.add.at(counts, codes, 1)
        np.add.at(runs, codes[np.flatnonzero(np.diff(codes, prepend=-1))], 1)
    sounds = np.where(
        counts[:, None, None] > 0, sums / np.maximum(counts, 1)[:, None, None], np.log(_POWER_FLOOR)
    )
    durations = np.maximum(1, np.round(counts / np.maximum(runs, 1)))
    return sounds.astype(np.float32), durations.astype(np.int32)


def waveform(logs: np.ndarray, config: UnitConfig) -> np.ndarray:
    """A wave of about the log-mel `logs` [frames, num_mels]; Griffin and Lim's iteration finds the phase."""
    hop = _hop(config)
    filters = _mel_filters(config.num_mels)
    power = np.maximum(0, np.exp(logs) - _POWER_FLOOR) @ (filters / (filters.sum(0) + 1e-8))
    magnitude = np.sqrt(power)
    window = _hann()
    length = (len(logs) - 1) * hop + _WINDOW
    weight = np.zeros(length)
    starts = np.arange(len(logs)) * hop
    for start in starts:
        weight[start : start + _WINDOW] += window**2
    phase = np.exp(2j * np.pi * np.random.default_rng(0).random(magnitude.shape))
    wave = np.zeros(length)
    for _ in range(_GRIFFIN_LIM_ROUNDS):
        frames = np.fft.irfft(magnitude * phase, _WINDOW, axis=1) * window
        wave = np.zeros(length)
        for start, frame in zip(starts, frames, strict=True):
            wave[start : start + _WINDOW] += frame
        wave /= np.maximum(weight, 1e-3)
        spectrum = np.fft.rfft(np.stack([wave[s : s + _WINDOW] for s in starts]) * window, axis=1)
        phase = spectrum / np.maximum(np.abs(spectrum), 1e-8)
    margin = _WINDOW // 2 - hop // 2
    wave = wave[margin : len(wave) - margin]
    return (wave / max(1.0, float(np.abs(wave).max()))).astype(np.float32)


def _read(data: Any, config: UnitConfig) -> np.ndarray:
    return read_wave(data)


TOKENIZER = TokenizerKind(UnitConfig, read=_read, fit=fit_units, open=open_units)
