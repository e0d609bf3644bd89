"""Small raw documents and shards for tests: coloured noise in blocks, tones, words."""

import io
import wave
from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from data_pipeline.shards.tar import write_shard
from data_pipeline.tokenize.raw import Part, document_sample

RATE_HZ = 16_000
WORDS = [
    "the",
    "red",
    "three",
    "is",
    "left",
    "of",
    "a",
    "blue",
    "five",
    "and",
    "they",
    "add",
    "up",
    "to",
    "eight",
]
SUFFIX = {"image": "png", "speech": "wav"}
CONFIG = """
max_bad_frac = 0.0
[text]
vocab_size = 512
[image]
size_px = 16
num_codes = 32
num_verbatim = 4
[speech]
num_units = 16
"""


def picture(seed: int, side_px: int = 16) -> np.ndarray:
    """uint8 [side, side, 3]; blocks of 4 pixels of a few colours, so that a small codebook can hold it."""
    blocks = np.random.default_rng(seed).choice([20, 130, 240], (side_px // 4, side_px // 4, 3))
    return blocks.repeat(4, 0).repeat(4, 1).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tone(seed: int, seconds: float = 0.4) -> np.ndarray:
    """int16; a tone that steps through pitches."""
    random = Random(seed)
    steps = [random.choice((200, 400, 800, 1600)) for _ in range(4)]
    samples = int(seconds * RATE_HZ / len(steps))
    time = np.arange(samples) / RATE_HZ
    return np.concatenate([8000 * np.sin(2 * np.pi * hertz * time) for hertz in steps]).astype(np.int16)


def wav(samples: np.ndarray, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(samples.dtype.itemsize)
        file.setframerate(rate_hz)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def document(seed: int) -> list[Part]:
    """Text, a picture and an utterance in some order, and now and then a second text."""
    random = Random(seed)
    parts = [
        Part("text", " ".join(random.choices(WORDS, k=12))),
        Part("image", png(picture(seed % 7))),
        Part("speech", wav(tone(seed % 5))),
    ]
    random.shuffle(parts)
    return parts if seed % 3 else [*parts, Part("text", "\nthe end")]


def write_raw(folder: Path, *, shards: int = 3, documents: int = 8, first: int = 0) -> Path:
    """raw-00000.tar ... with keys 0000 ... each. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        samples = (
            (f"{index:04d}", document_sample(document(first + number * documents + index), SUFFIX))
            for index in range(documents)
        )
        write_shard(folder / f"raw-{number:05d}.tar", samples)
    return folder
